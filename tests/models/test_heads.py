"""The chunked head: equal to the plain softmax in values and gradients, without ever holding all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import tree
from jaxft.core.weight import Affine
from jaxft.models import heads
from jaxft.models.config import Layer, ModelConfig
from jaxft.peft.lora import LoRAWeight

B, T, D, V = 2, 21, 16, 37
CONFIG = ModelConfig("llama", V, D, 32, 2, 2, 8, (Layer(),))
SHAPED = {
    "plain": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
    "capped and scaled": dataclasses.replace(CONFIG, final_softcap=2.0, logits_scale=0.5),
}


def example(config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Head, hidden states and labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    head = jax.random.normal(keys[0], (V, D) if config.tie_embeddings else (D, V))
    return head, jax.random.normal(keys[1], (B, T, D)), jax.random.randint(keys[2], (B, T), 0, V)


def plain(config: ModelConfig, head: jax.Array, x: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The definitions, over all logits at once."""
    logits = x @ (head.T if config.tie_embeddings else head) * config.logits_scale
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    logp = jax.nn.log_softmax(logits)
    p = jnp.exp(logp)
    return {
        "logp": jnp.take_along_axis(logp, labels[..., None], -1)[..., 0],
        "entropy": -jnp.sum(p * logp, -1),
        "correct": (jnp.argmax(logits, -1) == labels).astype(jnp.float32),
        "sum_p2": jnp.sum(p * p, -1),
    }


@pytest.mark.parametrize("name", SHAPED)
def test_values(name):
    config = SHAPED[name]
    head, x, labels = example(config)
    got, expected = heads.token_scores(config, head, x, labels, heads.NEEDS), plain(config, head, x, labels)
    assert set(got) == set(heads.NEEDS)
    for need in heads.NEEDS:
        assert got[need].dtype == jnp.float32 and got[need].shape == (B, T)
        np.testing.assert_allclose(got[need], expected[need], rtol=0, atol=1e-5, err_msg=need)


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_gradients(name, trained):
    config = SHAPED[name]
    head, x, labels = example(config)
    weights = jax.random.normal(jax.random.key(1), (B, T))

    def loss(score):
        return lambda head, x: jnp.sum(score(config, head, x, labels)["logp"] * weights)

    which = (0, 1) if trained else 1
    got = jax.grad(loss(heads.token_scores), which)(head, x)
    expected = jax.grad(loss(plain), which)(head, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_a_head_may_be_any_weight():
    """With a bias and an adapter, the factors alone trained: the gradients of dense autodiff, none for the rest."""
    head, x, labels = example(CONFIG)
    a, b = jax.random.normal(jax.random.key(2), (D, 2)), jax.random.normal(jax.random.key(3), (2, V))
    adapter = LoRAWeight(head, a, b, jnp.float32(0.5), jnp.int32(2))
    params = {"head": Affine(adapter, jnp.ones(V))}
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))

    def loss(trainable, score):
        return jnp.sum(score(CONFIG, tree.combine(trainable, frozen)["head"], x, labels)["logp"])

    got, expected = (jax.grad(loss)(trainable, score) for score in (heads.token_scores, plain))
    assert len(jax.tree.leaves(got)) == 2
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=0, atol=2e-5), got, expected)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_all_logits_never_exist(trained):
    """Read from the compiler: what the gradient of 1024 tokens over 32768 words needs is far below their logits."""
    config = dataclasses.replace(CONFIG, vocab_size=32768)
    head = jax.ShapeDtypeStruct((D, 32768), jnp.float32)
    x, labels = jax.ShapeDtypeStruct((2, 512, D), jnp.float32), jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def loss(head, x, labels):
        return jnp.sum(heads.token_scores(config, head, x, labels, ("logp", "entropy"))["logp"])

    memory = jax.jit(jax.grad(loss, (0, 1) if trained else 1)).lower(head, x, labels).compile().memory_analysis()
    everything = 2 * 512 * 32768 * 4
    assert memory.temp_size_in_bytes < (0.6 if trained else 0.4) * everything


def test_an_unknown_need_is_refused():
    head, x, labels = example(CONFIG)
    with pytest.raises(ValueError, match="perplexity"):
        heads.token_scores(CONFIG, head, x, labels, ("perplexity",))
