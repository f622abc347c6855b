"""Reward models: those of `transformers` load with equal rewards, and those made here load there."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

import jaxft
from jaxft import scoring
from jaxft.checkpoint.errors import CheckpointError
from jaxft.peft import IA3, BitFit, DoRA, Full, LastLayers, LoRA, PromptTuning, TrainableTokens
from jaxft.peft.disk import AdapterError
from jaxft.quant import four_bit
from jaxft.rollout import score
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.testing import jaxprs
from tests.models import tiny
from tests.test_model import words

PAD = 0
TOKENS = np.random.default_rng(0).integers(3, 97, (3, 12)).astype(np.int32)
LENGTHS = (12, 7, 10)
for _row, _length in enumerate(LENGTHS):
    TOKENS[_row, _length:] = PAD


def classifier(name: str, labels: int = 1) -> Any:
    """A random classifier of `transformers`, every parameter off its initialisation."""
    torch.manual_seed(0)
    config = tiny.CONFIGS[name]()
    config._attn_implementation, config.num_labels = "eager", labels
    made = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.25 if parameter.ndim == 1 else 0.1))
    return made.eval()


def said(made, tokens=TOKENS) -> np.ndarray:
    """float32[B]: what `transformers` says of rows padded on the right."""
    mask = torch.as_tensor(tokens != PAD).long()
    with torch.no_grad():
        return made(torch.as_tensor(tokens).long(), attention_mask=mask).logits[:, 0].float().numpy()


def reload(folder: Path, **how: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager", **how).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A reward model of llama, with a tokenizer."""
    path = tmp_path_factory.mktemp("reward")
    classifier("llama").save_pretrained(path)
    words(path)
    return path


@pytest.fixture(scope="module")
def model(folder) -> jaxft.Model:
    return jaxft.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> jaxft.Model:
    """A language model, with a tied head and a tokenizer."""
    path = tiny.save("llama_tied", tmp_path_factory.mktemp("speaker"))
    words(path)
    return jaxft.load(path, dtype="float32")


@pytest.mark.parametrize("name", [*scoring.ARCHITECTURES, "llama_tied"])
def test_every_familys_rewards_are_those_of_transformers_both_ways(name, tmp_path):
    made = classifier(name)
    made.save_pretrained(tmp_path / "theirs")
    loaded = jaxft.load(tmp_path / "theirs", dtype="float32")
    np.testing.assert_allclose(loaded.rewards(loaded.params, TOKENS), said(made), rtol=1e-4, atol=1e-5)
    assert scoring.ARCHITECTURES[loaded.config.family] == type(made).__name__
    other = dataclasses.replace(loaded, params={**loaded.params, "score": -3 * loaded.params["score"]})
    again = reload(jaxft.save_hf(other, other.params, tmp_path / "ours"))
    np.testing.assert_allclose(said(again), -3 * said(made), rtol=1e-5, atol=1e-6)


def test_sequences_of_a_row_are_scored_each_at_its_last_token(model):
    """Two rows: one of two sequences with padding behind, one of a third; also after a learnt prompt, and in bfloat16
    within its precision."""
    packed, segments = np.full((2, 24), 5, np.int32), np.zeros((2, 24), np.int32)
    for row, at, which in ((0, 0, 0), (0, 12, 1), (1, 3, 2)):
        where = slice(at, at + LENGTHS[which])
        packed[row, where], segments[row, where] = TOKENS[which, : LENGTHS[which]], at // 12 + 1
    alone = np.asarray(model.rewards(model.params, TOKENS))
    want = np.array([[alone[0], alone[1]], [alone[2], 0]])
    np.testing.assert_allclose(model.rewards(model.params, packed, segments), want, rtol=1e-5, atol=1e-6)
    prompted = jaxft.peft.adapt(model, jax.random.key(0), PromptTuning(tokens=3))
    alone = np.asarray(model.rewards(prompted, TOKENS))
    want = np.array([[alone[0], alone[1]], [alone[2], 0]])
    np.testing.assert_allclose(model.rewards(prompted, packed, segments), want, rtol=1e-5, atol=1e-6)


def test_no_logits_are_computed(model):
    """Nothing of the vocabulary's width is made; nor is there a head for it."""
    fn = score.make_score(model.config, ("reward",), dtype=jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, tokens: fn("policy", p, {"tokens": tokens})["reward"])(model.params, TOKENS)
    shapes = {v.aval.shape for eqn in jaxprs.equations(jaxpr) for v in eqn.outvars}
    assert not any(97 in shape for shape in shapes) and (3, 12, 1) in shapes
    for call in (lambda: model.logprobs(model.params, TOKENS), lambda: model.generate(model.params, ["w1"])):
        with pytest.raises(ValueError, match="model that scores sequences"):
            call()


def test_a_head_begins_as_transformers_draws_it_or_as_zeros(speaker):
    made = jaxft.reward_model(speaker, jax.random.key(0))
    head = np.asarray(made.params["score"])
    assert head.shape == (32, 1) and "head" not in made.params and made.params["layers"] is speaker.params["layers"]
    wide = dataclasses.replace(speaker, config=dataclasses.replace(speaker.config, hidden_size=40000))
    drawn = np.asarray(jaxft.reward_model(wide, jax.random.key(1)).params["score"])
    assert np.std(drawn) == pytest.approx(0.02, rel=0.02) and abs(np.mean(drawn)) < 4e-4
    zeros = jaxft.reward_model(speaker, init="zeros")
    assert not np.any(zeros.rewards(zeros.params, TOKENS))
    assert jaxft.reward_model(zeros) is zeros
    unnamed = dataclasses.replace(zeros, raw={**zeros.raw, "pad_token_id": None})
    assert jaxft.reward_model(unnamed).raw["pad_token_id"] == PAD


def test_what_is_made_here_loads_there(speaker, tmp_path):
    """Config, padding and tokenizer with it; a batch of rows of different lengths needs the padding token."""
    made = jaxft.reward_model(speaker, jax.random.key(0))
    out = jaxft.save_hf(made, made.params, tmp_path / "out")
    theirs = reload(out)
    np.testing.assert_allclose(said(theirs), made.rewards(made.params, TOKENS), rtol=1e-4, atol=1e-6)
    assert theirs.config.problem_type == "regression" and theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == PAD and not (out / "generation_config.json").exists()
    assert list(load_file(out / "model.safetensors"))[-1] == "score.weight"
    again = jaxft.load(out, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)


def trained(model: jaxft.Model, method, key: int = 1):
    """An adapter off its initialisation, the head with it."""
    params, mask, _ = jaxft.peft.adapt_for_training(model, jax.random.key(0), [method])
    ours, frozen = jaxft.partition(params, mask)
    leaves, shape = jax.tree.flatten(ours)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    moved = [a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jaxft.combine(jax.tree.unflatten(shape, moved), frozen), ours


IN_PEFT = [LoRA(rank=2), DoRA(rank=2), IA3(), BitFit(), PromptTuning(tokens=2)]


@pytest.mark.parametrize("method", IN_PEFT, ids=lambda m: type(m).__name__)
def test_adapters_load_in_peft_and_come_back(method, speaker, tmp_path):
    made = jaxft.reward_model(speaker, jax.random.key(0))
    params, ours = trained(made, method)
    assert ours["score"] is not None and not any(jax.tree.leaves(ours["embed"]))
    whole = TOKENS[:1]  # after a prompt, peft's models look for no padding
    folder = jaxft.save_adapter(made, params, tmp_path / "adapter", [method])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    want = np.asarray(made.rewards(params, whole))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = reload(speaker.directory, num_labels=1)
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        np.testing.assert_allclose(said(theirs, whole), want, rtol=1e-4, atol=1e-5)
        theirs.save_pretrained(tmp_path / "again")
    fresh = jaxft.reward_model(speaker, init="zeros")
    for source in (folder, tmp_path / "again"):
        np.testing.assert_allclose(fresh.rewards(jaxft.load_adapter(fresh, source), whole), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(AdapterError, match=r"SEQ_CLS.*jaxft\.reward_model"):
        jaxft.load_adapter(speaker, folder)
    if isinstance(method, LoRA):
        merged = jaxft.save_hf(made, jaxft.merge(params), tmp_path / "merged")
        np.testing.assert_allclose(said(reload(merged), whole), want, rtol=1e-4, atol=1e-5)


def test_an_adapter_made_by_peft_loads_here(folder, model, tmp_path):
    """peft itself lists `classifier`, which llama has not, among the modules that it saves."""
    torch.manual_seed(1)
    theirs: Any = peft.get_peft_model(
        reload(folder), peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    )
    with torch.no_grad():
        theirs.base_model.model.score.modules_to_save["default"].weight.mul_(-2)
    theirs.save_pretrained(tmp_path)
    assert "classifier" in json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    params = jaxft.load_adapter(model, tmp_path)
    np.testing.assert_allclose(model.rewards(params, TOKENS), said(theirs.eval()), rtol=1e-4, atol=1e-5)


OTHERS = [Full(select="norms"), LastLayers(n=1), TrainableTokens(tokens=(5,))]


@pytest.mark.parametrize("method", OTHERS, ids=lambda m: type(m).__name__)
def test_the_head_trains_with_every_method_and_is_saved(method, speaker, tmp_path):
    """In the project's format where peft's has no word for it."""
    made = jaxft.reward_model(speaker, jax.random.key(0))
    params, ours = trained(made, method)
    assert jax.tree.leaves(ours["score"])
    jaxft.save_adapter(made, params, tmp_path / "adapter", [method])
    back = jaxft.load_adapter(made, tmp_path / "adapter")
    np.testing.assert_array_equal(made.rewards(back, TOKENS), made.rewards(params, TOKENS))


def test_full_fine_tuning_trains_the_head_in_place(speaker):
    made = jaxft.reward_model(speaker, jax.random.key(0))
    _, mask, _ = jaxft.peft.adapt_for_training(made, jax.random.key(0), [Full()])
    assert mask["score"] is True and all(jax.tree.leaves(mask))


def test_on_a_mesh_over_a_four_bit_base_and_several_adapters(model):
    """Rows of two adapters in one batch; everything laid out over eight devices; NF4 is its dense self."""
    both = [trained(model, LoRA(rank=2), key)[0] for key in (1, 2)]
    want = np.stack([np.asarray(model.rewards(params, TOKENS)) for params in both])
    stacked = jaxft.stack_adapters(both)
    found = model.rewards(stacked, np.repeat(TOKENS, 2, 0), adapters=[0, 1] * 3)
    np.testing.assert_allclose(found, want.T.ravel(), rtol=1e-5, atol=1e-6)
    mesh = mesh_.create(mesh_.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(both[0], rules.shardings(both[0], mesh))
    np.testing.assert_allclose(model.rewards(placed, TOKENS), want[0], rtol=1e-4, atol=1e-5)
    down = model.params["layers"]["mlp"]["gate"]
    packed = four_bit.quantize(down, "nf4", 32)
    with_ = lambda w: {**both[0], "layers": {**both[0]["layers"], "mlp": {**both[0]["layers"]["mlp"], "gate": w}}}  # noqa: E731
    np.testing.assert_allclose(
        model.rewards(with_(packed), TOKENS), model.rewards(with_(packed.dense()), TOKENS), rtol=1e-4, atol=1e-5
    )


@pytest.fixture
def broken(folder, tmp_path):
    """Writes the reward model with another config or head."""

    def write(head=None, **changes) -> Path:
        out = Path(shutil.copytree(folder, tmp_path / "broken"))
        config = json.loads((out / "config.json").read_text()) | changes
        (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
        tensors = load_file(out / "model.safetensors")
        tensors.pop("score.weight")
        tensors |= {} if head is None else {"score.weight": head}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return out

    return write


def test_a_head_of_another_size_is_refused(broken):
    with pytest.raises(CheckpointError, match=r'\[2, 32\].*\[1, 32\].*"id2label" with an entry for each of the 2'):
        jaxft.load(broken(np.zeros((2, 32), np.float32)))


def test_a_head_of_another_width_is_refused(broken):
    with pytest.raises(CheckpointError, match=r"score.*\[1, 16\].*\[1, 32\]"):
        jaxft.load(broken(np.zeros((1, 16), np.float32)))


def test_a_missing_head_is_refused(broken):
    with pytest.raises(CheckpointError, match=r"no tensor score\.weight.*jaxft\.reward_model"):
        jaxft.load(broken())


def test_several_labels_load_and_give_no_reward(tmp_path):
    """The default of `transformers`, two labels, is not written down."""
    classifier("qwen2", 2).save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    loaded = jaxft.load(tmp_path, dtype="float32")
    assert loaded.params["score"].shape == (32, 2)
    for call in (lambda: loaded.rewards(loaded.params, TOKENS), lambda: jaxft.reward_model(loaded)):
        with pytest.raises(ValueError, match=r"2 labels.*expected"):
            call()


def test_what_cannot_become_a_reward_model_is_refused(speaker, tmp_path):
    with pytest.raises(ValueError, match="got a language model; expected a reward model"):
        speaker.rewards(speaker.params, TOKENS)
    with pytest.raises(ValueError, match="init='normal' draws the head; give a key"):
        jaxft.reward_model(speaker)
    adapted = dataclasses.replace(speaker, params=jaxft.peft.adapt(speaker, jax.random.key(0), LoRA(rank=2)))
    with pytest.raises(ValueError, match="hold an adapter; merge it first"):
        jaxft.reward_model(adapted, init="zeros")
    bare = dataclasses.replace(speaker, own_tokenizer=words(tmp_path))
    bare.own_tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*model\.pad_token"):
        jaxft.reward_model(bare, init="zeros")
    granite = jaxft.load(tiny.save("granite", tmp_path / "granite"), dtype="float32")
    with pytest.raises(ValueError, match="family granite, for which transformers has no sequence classifier"):
        jaxft.reward_model(granite, init="zeros")
