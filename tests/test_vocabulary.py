"""Tokens added to a model: together with its tokenizer, head and config, and in every file that is written."""

import json

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

import jaxft
from jaxft import peft, vocabulary
from jaxft.peft import LoRA, TrainableTokens
from tests.models import tiny
from tests.peft import pairs
from tests.test_model import words

NEW = ("<tool>", "<end_tool>")
KEY = jax.random.key(0)


@pytest.fixture(scope="module", params=["llama", "llama_tied"])
def model(request, tmp_path_factory) -> jaxft.Model:
    directory = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    words(directory)
    return jaxft.load(directory, dtype="float32")


def test_everything_grows_together(model):
    grown = jaxft.grow(model, NEW, multiple=8)
    assert grown.new_tokens == (97, 98) and grown.config.vocab_size == grown.raw["vocab_size"] == 104
    assert grown.tokenizer("w1 <tool> w2")["input_ids"] == [1, 6, 97, 7]
    old, new = model.params["embed"]["tokens"], grown.params["embed"]["tokens"]
    np.testing.assert_array_equal(new[:97], old)
    np.testing.assert_allclose(new[97:], np.broadcast_to(np.mean(old, 0), (7, 32)), atol=1e-6)
    if "head" in model.params:
        assert grown.params["head"].shape == (32, 104)
        np.testing.assert_array_equal(grown.params["head"][:, :97], model.params["head"])
    assert model.tokenizer("<tool>")["input_ids"] == [1, 0] and model.params["embed"]["tokens"].shape[0] == 97


def trained(grown: jaxft.Model, *methods):
    params, mask, _ = peft.adapt_for_training(grown, KEY, methods)
    return pairs.moved(params, KEY) if mask is not None else params


TOKENS = np.array([[5, 97, 9, 98, 6, 97]])


def test_export_loads_in_transformers_with_its_tokenizer(model, tmp_path):
    grown = jaxft.grow(model, NEW)
    params = trained(grown, TrainableTokens(), LoRA(rank=2))
    out = jaxft.save_hf(grown, jaxft.merge(params), tmp_path / "merged")
    read = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert read.config.vocab_size == 99 and read.config.tie_word_embeddings == ("head" not in model.params)
    assert transformers.AutoTokenizer.from_pretrained(out)("<tool>")["input_ids"] == [1, 97]
    expected = logits(grown, params)
    np.testing.assert_allclose(tiny.logits(read, TOKENS), expected, atol=1e-5)
    np.testing.assert_allclose(logits(jaxft.load(out, dtype="float32")), expected, atol=1e-5)


def logits(model: jaxft.Model, params=None) -> np.ndarray:
    return np.asarray(pairs._logits(model.config, model.params if params is None else params, TOKENS))


METHODS = {
    "the new rows": ([TrainableTokens()], "TRAINABLE_TOKENS"),
    "new rows and lora": ([TrainableTokens(head=True), LoRA(rank=2, targets=("q_proj",))], "LORA"),
    "lora alone": ([LoRA(rank=2, targets=("q_proj",))], "LORA"),
    "lora of the embedding": ([LoRA(rank=2, targets=("q_proj", "embed_tokens"))], "LORA"),
    "whole embedding": ([LoRA(rank=2, targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))], "LORA"),
    "two adapters": ([LoRA(rank=2, targets=("q_proj",)), LoRA(rank=2, targets=("q_proj",))], "JAXFT"),
}


@pytest.mark.parametrize("case", METHODS)
def test_adapters_know_the_grown_vocabulary(model, case, tmp_path):
    """Read back on a base grown otherwise it is the same model, and in peft on one resized by transformers."""
    methods, kind = METHODS[case]
    grown = jaxft.grow(model, NEW)
    params = trained(grown, *methods)
    out = jaxft.save_adapter(grown, params, tmp_path / "adapter")
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == kind
    other = jaxft.grow(model, NEW)
    tokens = other.params["embed"]["tokens"]
    other.params["embed"]["tokens"] = tokens.at[97:].add(1.0)
    np.testing.assert_allclose(logits(grown, jaxft.load_adapter(other, out)), logits(grown, params), atol=1e-5)
    if kind != "JAXFT":
        base = tiny.model("llama" if "head" in model.params else "llama_tied")
        base.resize_token_embeddings(99)
        read = pairs.quietly(pairs.peft.PeftModel.from_pretrained, base, str(out)).eval()
        np.testing.assert_allclose(tiny.logits(read, TOKENS), logits(grown, params), atol=1e-5)


def test_only_what_is_needed_is_stored(model, tmp_path):
    grown = jaxft.grow(model, NEW)
    head = "head" in model.params
    out = jaxft.save_adapter(grown, trained(grown, TrainableTokens(head=head)), tmp_path / "a")
    assert {t.shape for t in load_file(out / "adapter_model.safetensors").values()} == {(2, 32)}


def test_the_tokenizer_of_an_adapter(model, tmp_path):
    """One with more tokens than the model's makes it grow; rows to spare stay as they are; any other is left alone."""
    tokenizer = jaxft.grow(model, NEW).tokenizer
    grown = vocabulary.with_tokenizer(model, tokenizer)
    assert grown.new_tokens == (97, 98) and grown.config.vocab_size == 99
    spare = jaxft.grow(model, ("<x>", "<y>", "<z>"))
    spare = vocabulary.with_tokenizer(vocabulary.dataclasses.replace(spare, own_tokenizer=model.tokenizer), tokenizer)
    assert spare.config.vocab_size == 100
    assert vocabulary.with_tokenizer(model, model.tokenizer) is model


@pytest.mark.parametrize(
    ("tokens", "said"),
    [(("w1",), "got .'w1'.; expected tokens that are not"), (("<a>", "<a>"), "'<a>'"), ((" ",), "' '")],
)
def test_refused_by_name(model, tokens, said):
    with pytest.raises(ValueError, match=said):
        jaxft.grow(model, tokens)
    with pytest.raises(ValueError, match="expected token ids, tokens as text"):
        peft.adapt(model, KEY, TrainableTokens())
    with pytest.raises(ValueError, match="'<tool>' is no single token"):
        peft.adapt(model, KEY, TrainableTokens(tokens=("<tool>",)))
    with pytest.raises(ValueError, match=r"got \[97\]; expected ids from 0 to 96"):
        peft.adapt(model, KEY, TrainableTokens(tokens=(97, 3)))
    assert peft.adapt(model, KEY, TrainableTokens(tokens=("w1", 3)))["embed"]["tokens"].ids.tolist() == [3, 6]
