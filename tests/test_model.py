"""The facade that users type: load, log-probabilities, text in and out, adapters, saving."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import jaxft
from jaxft.checkpoint.errors import CheckpointError
from tests.models import tiny

WORDS = ["<pad>", "<s>", "</s>", "user", "assistant", *[f"w{i}" for i in range(92)]]
TEMPLATE = (
    "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def words(directory: Path) -> PreTrainedTokenizerFast:
    """Saves a tokenizer of 97 words, which begins every text with <s>."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return fast


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tiny llama with a tokenizer."""
    path = tiny.save("llama", tmp_path_factory.mktemp("model"))
    words(path)
    return path


@pytest.fixture(scope="module")
def model(directory) -> jaxft.Model:
    return jaxft.load(directory, dtype="float32")


def reference(tokens: np.ndarray) -> np.ndarray:
    """Torch's log-probabilities of each next token: float32[B, T-1]."""
    logp = torch.log_softmax(torch.as_tensor(tiny.logits(tiny.model("llama"), tokens)), -1)
    return logp[:, :-1].gather(-1, torch.as_tensor(tokens).long()[:, 1:, None])[..., 0].numpy()


def test_logprobs(model):
    """Rows padded on the right agree with torch wherever the next token is real."""
    tokens = np.random.default_rng(0).integers(3, 97, (2, 11))
    expected = reference(tokens)
    got = model.logprobs(model.params, tokens)
    assert got.shape == (2, 10) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    shorter = tokens.copy()
    shorter[1, 6:] = 0
    np.testing.assert_allclose(model.logprobs(model.params, shorter)[1, :5], expected[1, :5], atol=1e-5)


def test_logprobs_of_documents_packed_in_rows(model):
    """Two documents of a row, with padding between and on both sides, are as if each stood alone."""
    a, b = (np.random.default_rng(i).integers(3, 97, (1, n)) for i, n in ((1, 5), (2, 4)))
    tokens = np.zeros((1, 14), int)
    segments = np.zeros((1, 14), int)
    tokens[:, 2:7], segments[:, 2:7] = a, 1
    tokens[:, 8:12], segments[:, 8:12] = b, 2
    expected = np.zeros((1, 13), np.float32)
    expected[:, 2:6], expected[:, 8:11] = reference(a), reference(b)
    np.testing.assert_allclose(model.logprobs(model.params, tokens, segments), expected, atol=1e-5)


def test_text_from_weights_trained_in_place(directory):
    """They are float32 on a bfloat16 base, as a training state holds them."""
    model = jaxft.load(directory, dtype="bfloat16")
    trained, frozen = jaxft.partition(model.params, jaxft.trainable_mask(model.params, r"layers/mlp/down$"))
    mixed = jaxft.combine(jax.tree.map(lambda a: a.astype("float32"), trained), frozen)
    options = {"max_new_tokens": 4, "temperature": 0.0}
    assert model.generate(mixed, ["w1 w2"], **options) == model.generate(model.params, ["w1 w2"], **options)


def test_text_is_continued_as_transformers_does(model, directory):
    prompts = ["w1 w2 w3", "w60 w5 w9 w20 w21 w22 w23"]
    theirs, tokenizer = tiny.model("llama"), AutoTokenizer.from_pretrained(directory)
    for prompt, text in zip(
        prompts, model.generate(model.params, prompts, max_new_tokens=8, temperature=0.0), strict=True
    ):
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = theirs.generate(inputs, max_new_tokens=8, do_sample=False)[0, inputs.shape[1] :]
        assert text == tokenizer.decode(made, skip_special_tokens=True)
        assert len(text.split()) > 3


def test_a_chat_is_answered(model):
    """Messages go through the tokenizer's chat template."""
    messages = [{"role": "user", "content": "w1 w2"}]
    answer = model.generate(model.params, [messages], max_new_tokens=6, temperature=0.0)
    assert answer == model.generate(model.params, ["user w1 w2 assistant"], max_new_tokens=6, temperature=0.0)


def test_one_string_is_not_a_list_of_prompts(model):
    with pytest.raises(TypeError, match="expected a list of them"):
        model.generate(model.params, "w1 w2")


def test_a_model_without_a_tokenizer(tmp_path):
    model = jaxft.load(tiny.save("llama", tmp_path))
    assert model.tokenizer is None
    with pytest.raises(ValueError, match="holds no tokenizer"):
        model.generate(model.params, ["w1"])


def test_the_tokenizer_travels_with_the_model(model, directory, tmp_path):
    out = jaxft.save_hf(model, model.params, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (directory / name).read_bytes()
    changed = words(tmp_path / "words")
    changed.chat_template = "{{ messages }}"
    own = dataclasses.replace(model, own_tokenizer=changed)
    assert own.tokenizer is changed
    out = jaxft.save_hf(own, own.params, tmp_path / "own")
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"


def test_a_broken_tokenizer_is_said_to_be_broken(directory, tmp_path):
    path = tiny.save("llama", tmp_path)
    (path / "tokenizer.json").write_text("{}")
    model = jaxft.load(path)
    with pytest.raises(CheckpointError, match="a tokenizer that does not load"):
        _ = model.tokenizer


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_to_peft_and_back(model, directory, tmp_path, key):
    tokens = np.random.default_rng(0).integers(3, 97, (2, 11))
    params = jaxft.peft.adapt(model, key, jaxft.peft.LoRA(rank=4, targets="all-linear"))
    params = jax.tree.map(lambda t, a: a + 0.05 if t else a, jaxft.trainable_mask(params), params)
    expected = model.logprobs(params, tokens)
    assert np.abs(expected - model.logprobs(model.params, tokens)).max() > 0.1
    out = jaxft.save_adapter(model, params, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), out).eval()
    logp = torch.log_softmax(torch.as_tensor(tiny.logits(theirs, tokens)), -1)
    got = logp[:, :-1].gather(-1, torch.as_tensor(tokens)[:, 1:, None])[..., 0]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert theirs.peft_config["default"].base_model_name_or_path == str(directory)
    np.testing.assert_allclose(model.logprobs(jaxft.load_adapter(model, out), tokens), expected, atol=1e-5)


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)  # as if not installed

import jaxft
model = jaxft.load(sys.argv[1])
assert "transformers" not in sys.modules, "the tokenizer is loaded when first asked for"
print(model.generate(model.params, ["w1 w2"], max_new_tokens=4))
jaxft.save_hf(model, model.params, sys.argv[2])
assert "torch" not in sys.modules
"""


def test_torch_is_not_needed(directory, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(directory), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_embedded_model_is_one_like_any_other():
    """It loads in transformers, with our log-probabilities, and knows a little."""
    folder = Path(__file__).parents[1] / "assets" / "tiny"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = jaxft.load(folder, dtype="float32")
    ids = ours.tokenizer("Words: sun moon tree. The second word is moon", return_tensors="np")["input_ids"]
    with torch.no_grad():
        logp = torch.log_softmax(theirs(torch.tensor(ids)).logits, -1)[0, :-1]
    expected = logp.gather(-1, torch.tensor(ids)[0, 1:, None])[:, 0].numpy()
    got = np.asarray(ours.logprobs(ours.params, ids))[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert got[-1] > np.log(0.9)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
