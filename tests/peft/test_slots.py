"""Prompts, prefixes and the networks that make them: gradients, counts, inits and refusals. Logits: `test_parity`."""

import json
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.p_tuning import PromptEncoder
from safetensors.numpy import load_file, save_file

from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.core.weight import NotMergeable
from jaxft.models import decoder, heads, slots
from jaxft.peft import (
    METHODS,
    LoRA,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    disk,
    places,
    store,
    whole,
)
from jaxft.rollout import score
from tests.peft import pairs

KEY = jax.random.key(0)
D, KV, L = 32, 16, 3  # of the tiny llama: features, features of a layer's keys, layers


def adapt(name, method, tokenizer=None, key=KEY):
    model = pairs.model(name)
    model.tokenizer = tokenizer
    return jaxft_peft.adapt(model, key, method)


@pytest.mark.parametrize(
    ("name", "method"), [("llama", PromptTuning(tokens=4, init="random")), ("gemma2", PrefixTuning(tokens=4))]
)
def test_one_steps_gradient_is_torchs(name, method, tmp_path):
    """The first token has no loss: nothing of the text precedes it."""
    params = adapt(name, method)
    made = pairs.peft_load(name, pairs.save(name, params, tmp_path / "adapter"))
    rows = made.prompt_encoder["default"].embedding.weight.requires_grad_()
    batch = torch.as_tensor(pairs.TOKENS).long()
    labels = batch.clone()
    labels[:, 0] = -100
    made(batch, labels=labels).loss.backward()
    run = score.make_score(pairs.ours(name).config, dtype=jnp.float32)
    (place,) = set(params) - set(pairs.ours(name).params)

    def loss(slot):
        logp_BT = run("policy", {**params, place: slot}, {"tokens": jnp.asarray(pairs.TOKENS)})["logp"]
        return -jnp.sum(logp_BT) / (logp_BT.size - len(logp_BT))

    (ours,) = jax.tree.leaves(jax.jit(jax.grad(loss))(params[place]))
    theirs = rows.grad.numpy()
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


h = 8
COUNTS = {
    # as the docstrings count them, with 5 tokens
    "prompt_tuning": (PromptTuning(tokens=5), 5 * D),
    "multitask_prompt_tuning": (MultitaskPromptTuning(tokens=5, tasks=3, rank=2), 5 * D + 3 * (5 + D) * 2),
    "p_tuning": (PTuning(tokens=5, hidden=h), 5 * D + (D + 1) * h + (h + 1) * h + (h + 1) * D),
    "p_tuning by lstm": (
        PTuning(tokens=5, hidden=h, encoder="lstm", lstm_layers=3),
        5 * D + 8 * h * (D + h + 1) + 2 * 8 * h * (3 * h + 1) + (2 * h + 1) * 2 * h + (2 * h + 1) * D,
    ),
    "prefix_tuning": (PrefixTuning(tokens=5), 5 * 2 * L * KV),
    "prefix_tuning by projection": (
        PrefixTuning(tokens=5, projection=True, hidden=h),
        5 * KV + (KV + 1) * h + (h + 1) * 2 * L * KV,
    ),
    "p_tuning_v2": (PTuningV2(tokens=5), 5 * 2 * L * KV),
}


@pytest.mark.parametrize("case", COUNTS)
def test_what_trains_is_counted_by_the_docstring(case):
    """And is all of the slot, nothing of the base; the table knows its length; without it the base is back."""
    method, expected = COUNTS[case]
    params = adapt("llama", method)
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    assert tree.count(trainable) == expected
    assert tree.count(frozen) == tree.count(pairs.ours("llama").params)
    lengths = {"prompt": slots.prompt_length(params), "prefix": slots.prefix_length(params)}
    assert {name: n for name, n in lengths.items() if n} == {method.slot: method.tokens}
    assert jaxft_peft.method_of(method) is METHODS[case.split(" ")[0]]
    bare = tree.strip(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(bare), jax.tree.leaves(pairs.ours("llama").params), strict=True))
    with pytest.raises(NotMergeable, match=method.slot):
        tree.merge(params)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_the_encoder_is_peft_s(kind):
    """With its weights, the rows it makes; torch's two biases of a gate are one here."""
    torch.manual_seed(0)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=D, num_transformer_submodules=1, num_layers=L,
        num_attention_heads=4, encoder_hidden_size=h, encoder_reparameterization_type=kind,
    )  # fmt: skip
    theirs = PromptEncoder(config).eval()
    held = {name: jnp.asarray(p.detach().numpy()) for name, p in theirs.named_parameters()}
    linear = sorted({name.rpartition(".")[0] for name in held if name.startswith("mlp_head")})
    mlp = {str(i): {"weight": held[f"{m}.weight"].T, "bias": held[f"{m}.bias"]} for i, m in enumerate(linear)}

    def both(name, fn):
        return jnp.stack([fn(f"{name}{end}") for end in ("", "_reverse")])

    lstm = (
        {}
        if kind == "MLP"
        else {
            str(i): {
                "in": both(f"lstm_head.weight_ih_l{i}", lambda n: held[n].T),
                "state": both(f"lstm_head.weight_hh_l{i}", lambda n: held[n].T),
                "bias": both(f"l{i}", lambda n: held[f"lstm_head.bias_ih_{n}"] + held[f"lstm_head.bias_hh_{n}"]),
            }
            for i in range(2)
        }
    )
    slot = adapt("llama", PTuning(tokens=5, hidden=h, encoder=kind.lower()))["prompt"]
    filled = type(slot)(held["embedding.weight"], mlp, lstm if kind == "LSTM" else None)
    assert [a.shape for a in jax.tree.leaves(filled)] == [a.shape for a in jax.tree.leaves(slot)]
    expected = theirs(torch.arange(5)).detach().numpy()
    np.testing.assert_allclose(filled.dense()[0], expected, atol=1e-6)


def test_dropout_of_the_lstm_is_by_key_alone():
    params = adapt("llama", PTuning(tokens=5, hidden=h, encoder="lstm", dropout=0.5))
    seen = [tree.dropout_keys(params, key)["prompt"].dense() for key in (None, KEY, KEY, jax.random.key(1))]
    assert bool(jnp.all(seen[1] == seen[2]))
    assert all(bool(jnp.any(seen[a] != seen[b])) for a, b in ((0, 1), (1, 3)))


def test_a_multitask_prompt_goes_both_ways(tmp_path):
    """Rows of different tasks, in peft and here."""
    tasks, tokens = torch.tensor([1, 2]), torch.as_tensor(pairs.TOKENS).long()
    tasks_BT = jnp.broadcast_to(jnp.asarray(tasks.numpy(), jnp.int32)[:, None], pairs.TOKENS.shape)

    def theirs_of(made):
        with torch.no_grad():
            return made(tokens, task_ids=tasks).logits.numpy()[:, -tokens.shape[1] :]

    def ours_of(params):
        config = pairs.ours("llama").config
        hidden, _, _ = decoder.forward(config, params, jnp.asarray(pairs.TOKENS), tasks_BT=tasks_BT)
        return np.asarray(heads.logits(config, heads.head_of(config, params), hidden))

    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2, prompt_tuning_init="RANDOM"
    )
    made = pairs.peft_model("llama", config)
    params = pairs.load("llama", pairs.peft_save(made, tmp_path / "theirs"))
    np.testing.assert_allclose(ours_of(params), theirs_of(made), rtol=1e-5, atol=1e-5)

    params = pairs.adapted("llama", MultitaskPromptTuning(tokens=5, tasks=3, rank=2, init="random"), KEY)
    made = pairs.peft_load("llama", pairs.save("llama", params, tmp_path / "ours"))
    np.testing.assert_allclose(ours_of(params), theirs_of(made), rtol=1e-5, atol=1e-5)
    assert np.abs(ours_of({**params, "prompt": params["prompt"].dense()[:1]}) - ours_of(params)).max() > 1e-2


def test_a_multitask_prompt_begins_near_the_shared_one_or_at_its_source(tmp_path):
    fresh = adapt("llama", MultitaskPromptTuning(tokens=5, tasks=3, rank=2))["prompt"]
    # the tasks' random factors near 1 are the point: each prompt is near the shared one, not equal to it
    np.testing.assert_allclose(
        fresh.dense(), jnp.broadcast_to(fresh.value, (3, 5, D)), atol=0.2 * jnp.abs(fresh.value).max()
    )
    source = pairs.save(
        "llama", pairs.adapted("llama", MultitaskPromptTuning(tokens=5, tasks=3), KEY), tmp_path / "source"
    )
    old = pairs.load("llama", source)["prompt"]
    for choice, left in (("average", old.left.mean(0)), (2, old.left[2])):
        config = MultitaskPromptTuning(tokens=5, tasks=2, source=str(source), source_task=choice)
        new = adapt("llama", config)["prompt"]
        np.testing.assert_allclose(new.left, jnp.broadcast_to(left, (2, 5, 1)), atol=1e-7)
        assert bool(jnp.all(new.value == old.value))
    shared = adapt("llama", MultitaskPromptTuning(tokens=5, source=str(source), source_task="none"))["prompt"]
    assert bool(jnp.all(shared.value == old.value)) and bool(jnp.all(shared.left != old.left[:1]))
    for wrong, message in (({"source_task": 3}, "tasks 0 to 2"), ({"tokens": 4}, "same tokens and rank")):
        with pytest.raises(ValueError, match=message):
            adapt("llama", MultitaskPromptTuning(**{"tokens": 5, "source": str(source), **wrong}))


@pytest.mark.parametrize(("name", "scale"), [("llama", 1.0), ("gemma2", 32**0.5), ("granite", 1.0)])
def test_a_prompt_of_words_begins_where_they_are_looked_up(name, scale):
    """A text, cut or repeated; or words of the vocabulary: every row is a token's embedding as the look-up gives it."""
    table = np.asarray(pairs.ours(name).params["embed"]["tokens"]) * scale
    ids = [7, 3, 9]
    reader = lambda text: {"input_ids": ids if text == "sort these" else []}  # noqa: E731
    prompt = adapt(name, PromptTuning(tokens=5, init="text", init_text="sort these"), reader)["prompt"]
    np.testing.assert_allclose(prompt.value, table[[7, 3, 9, 7, 3]], rtol=1e-6)
    drawn = adapt(name, PromptTuning(tokens=5))["prompt"].value
    nearest = np.abs(table[:, None] - np.asarray(drawn)).max(-1).min(0)
    assert nearest.max() < 1e-5
    with pytest.raises(ValueError, match="no tokenizer"):
        adapt(name, PromptTuning(init="text", init_text="sort these"))
    with pytest.raises(ValueError, match="expected both or neither"):
        PromptTuning(init="text")


def test_zero_inits_of_a_prefix():
    for projection in (False, True):
        prefix = adapt("llama", PrefixTuning(tokens=4, init="zero", projection=projection))["prefix"]
        assert not np.asarray(prefix.dense()).any()


def test_slots_and_lora_train_together(tmp_path):
    """Every trained array has a gradient; our own format holds all of it, encoder included; one prompt is enough."""
    params = adapt("llama", [LoRA(rank=2), PTuning(tokens=3, hidden=h), PrefixTuning(tokens=4, projection=True)])
    params = pairs.moved(params, KEY)
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    run = score.make_score(pairs.ours("llama").config, dtype=jnp.float32)
    batch = {"tokens": jnp.asarray(pairs.TOKENS)}
    grads = jax.jit(jax.grad(lambda t: jnp.sum(run("policy", tree.combine(t, frozen), batch)["logp"])))(trainable)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    chex.assert_trees_all_equal(pairs.load("llama", pairs.save("llama", params, tmp_path / "adapter")), params)
    with pytest.raises(ValueError, match="already has a prompt"):
        adapt("llama", [PromptTuning(), PTuning()])


def test_an_embedding_trained_whole_beside_a_prompt_is_saved_in_our_format(tmp_path):
    """peft looks the tokens up in the model's own, and would ignore it."""
    (row,) = (name for name in pairs.ours("llama").names if name.path == places.TOKENS)
    params = pairs.moved(whole.wrap(adapt("llama", PromptTuning(tokens=4)), row, False), KEY)
    directory = pairs.save("llama", params, tmp_path / "adapter")
    assert json.loads((directory / disk.CONFIG).read_text())["peft_type"] == "JAXFT"
    chex.assert_trees_all_equal(pairs.load("llama", directory), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 4}, "num_layers: got 4; expected 3"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: got 2; expected 1"),
        ({"num_virtual_tokens": 6}, r"prompt_embeddings: got shape \[5, 96\]; expected \[6, 96\]"),
        ({"num_attention_heads": 3}, "num_attention_heads, token_dim: got 3, 16"),
        ({"num_frozen_tokens": 1}, "num_frozen_tokens"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message, tmp_path):
    folder = pairs.save("llama", adapt("llama", PrefixTuning(tokens=5)), tmp_path / "adapter")
    config = json.loads((folder / disk.CONFIG).read_text())
    (folder / disk.CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(disk.AdapterError, match=message):
        pairs.load("llama", folder)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    folder = pairs.save("llama", adapt("llama", PromptTuning(tokens=5)), tmp_path / "adapter")
    with pytest.raises(disk.AdapterError, match="unused tensors /more"):
        _rewritten(folder, lambda held: {**held, "more": held["prompt_embeddings"]})
    with pytest.raises(disk.AdapterError, match="no tensor prompt_embeddings"):
        _rewritten(folder, lambda held: {})
    with pytest.raises(disk.AdapterError, match="a second prompt"):
        loaded = pairs.ours("llama")
        store.load(adapt("llama", PromptTuning()), loaded.names, L, folder)


def _rewritten(folder, fn):
    file = folder / disk.WEIGHTS
    old = load_file(file)
    save_file(fn(old), file)
    try:
        pairs.load("llama", folder)
    finally:
        save_file(old, file)


def test_facade_passes_the_tokenizer_lazily():
    """Only a text asks for it."""

    class Model(SimpleNamespace):
        @property
        def tokenizer(self):
            raise AssertionError("nobody asked for text")

    loaded = pairs.ours("llama")
    jaxft_peft.adapt(Model(params=loaded.params, names=loaded.names, config=loaded.config), KEY, PromptTuning())
