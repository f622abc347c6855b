"""The step on a real model: accumulation, packing, what is kept in memory, and what dtype it is in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft
from jaxft.core import tree
from jaxft.models import families, init
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.rollout import score
from jaxft.training import optim, state, step
from jaxft.training.config import OptimConfig
from tests.training import tiny

ROW = OBJECTIVES["sft"]
PLAIN = OptimConfig(name="sgd", lr=0.1, clip_norm=None)  # an update that is linear in the gradient


def llama(vocabulary=64, width=32):
    raw = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    return families.read(raw)


class Model:
    def __init__(self, config, names, dtype):
        self.params, self.names = init.random(config, names, jax.random.key(0), dtype, deviation=0.2), names


def build(method, optimizer=PLAIN, dtype=jnp.float32, needs=("logp", "correct"), **shape):
    """(step, a function that makes the first state, frozen)"""
    config, names = llama(**shape)
    params = peft.adapt(Model(config, names, dtype), jax.random.key(1), method)
    mask = tree.trainable_mask(params, peft.method_of(method).select(method))
    trainable, frozen = tree.partition(params, mask)
    if isinstance(method, peft.LoRA):
        trainable = jax.tree.map(lambda a: a + 0.05, trainable)  # B = 0 would hide A's gradient
    optimizer_ = optim.make(optimizer, trainable, 10)
    run = step.make_step(ROW, SFT(), score.make_score(config, needs, dtype=dtype), optimizer_)
    return run, lambda: state.create(trainable, optimizer_, jax.random.key(2)), frozen


def close(got, want, rtol, atol):
    got, want = dict(tree.paths(got)), dict(tree.paths(want))
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize("method", [peft.LoRA(rank=4), peft.Full()], ids=["lora", "full"])
def test_one_row_eight_times_is_eight_rows_once(method):
    """Ragged token counts: the loss is a mean over tokens, not over micro-batches."""
    run, begin, frozen = build(method)
    whole, split = begin(), begin()
    for seed in range(2):
        batch = tiny.batch(seed, rows=8)
        whole, want = run(whole, frozen, tiny.micro(batch, 1))
        split, got = run(split, frozen, tiny.micro(batch, 8))
        close(got, want, rtol=2e-5, atol=1e-6)
    close(split.trainable, whole.trainable, rtol=1e-4, atol=1e-6)


def test_packed_rows_are_the_same_step_as_documents_apart():
    run, begin, frozen = build(peft.LoRA(rank=4))
    apart = tiny.batch(3, rows=4)
    packed = {name: value.reshape(2, -1) for name, value in apart.items()}
    packed["segments"] = np.where(packed["segments"] > 0, np.repeat([[1, 2]], 12, axis=1).reshape(1, -1), 0)
    one, want = run(begin(), frozen, tiny.micro(apart, 1))
    two, got = run(begin(), frozen, tiny.micro(packed, 1))
    close(got, want, rtol=2e-5, atol=1e-6)
    close(two.trainable, one.trainable, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [peft.LoRA(rank=2), peft.Full()], ids=["lora", "full"])
def test_no_logits_of_the_whole_batch(method):
    """With a vocabulary of 32768 the step's scratch memory stays below half of one float32 [B, T, V]."""
    batch, length, vocabulary = 4, 64, 32768
    run, begin, frozen = build(method, vocabulary=vocabulary, width=16)
    rows = {"tokens": np.ones((1, batch, length), np.int32), "loss_mask": np.ones((1, batch, length), bool)}
    memory = run.lower(begin(), frozen, rows).compile().memory_analysis()
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(begin().trainable))
    assert memory.temp_size_in_bytes - 3 * trained < batch * length * vocabulary * 4 / 2


def test_adapters_of_a_bfloat16_base_train_in_float32():
    run, begin, frozen = build(peft.LoRA(rank=4), OptimConfig(lr=1e-5), dtype=jnp.bfloat16)
    before = begin()
    first = {path: np.asarray(leaf) for path, leaf in tree.paths(before.trainable)}
    after, metrics = run(before, frozen, tiny.micro(tiny.batch(0), 2))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.trainable)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen) if leaf.ndim > 1} == {"bfloat16"}
    assert metrics["loss"].dtype == jnp.float32 and bool(jnp.isfinite(metrics["grad_norm"]))
    # an update of 1e-5, far below bfloat16's spacing, is not lost
    moved = np.abs(np.asarray(after.trainable["layers"]["attn"]["q"].a) - first["layers/attn/q/a"])
    assert 5e-6 < moved.max() < 2e-5
