"""The chunked head: equal to the plain softmax in values and gradients, without ever holding all logits."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import tree, verbs
from jaxft.core.weight import Affine, InPlace, Untied
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


def plain(
    config: ModelConfig, head: jax.Array, x: jax.Array, labels: jax.Array, temperature: float = 1.0
) -> dict[str, jax.Array]:
    """The definitions, over all logits at once."""
    logits = x @ (head.T if config.tie_embeddings else head) * config.logits_scale
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    logp = jax.nn.log_softmax(logits / temperature)
    p = jnp.exp(logp)
    return {
        "logp": jnp.take_along_axis(logp, labels[..., None], -1)[..., 0],
        "entropy": -jnp.sum(p * logp, -1),
        "trained_entropy": -jnp.sum(p * logp, -1),
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
def test_at_another_temperature(name):
    """After the cap; values, and gradients of a frozen head."""
    config = SHAPED[name]
    head, x, labels = example(config)
    got = heads.token_scores(config, head, x, labels, heads.NEEDS, temperature=1.4)
    expected = plain(config, head, x, labels, 1.4)
    for need in heads.NEEDS:
        np.testing.assert_allclose(got[need], expected[need], rtol=0, atol=1e-5, err_msg=need)
    slope = jax.grad(lambda x: heads.token_scores(config, head, x, labels, temperature=1.4)["logp"].sum())(x)
    wanted = jax.grad(lambda x: plain(config, head, x, labels, 1.4)["logp"].sum())(x)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_gradients(name, trained):
    config = SHAPED[name]
    head, x, labels = example(config)
    weights = jax.random.normal(jax.random.key(1), (B, T))

    def loss(score):
        def total(head, x):
            found = score(config, head, x, labels, *([heads.TRAINED] if score is heads.token_scores else []))
            return jnp.sum(found["logp"] * weights + found["trained_entropy"] * weights[::-1])

        return total

    which = (0, 1) if trained else 1
    got = jax.grad(loss(heads.token_scores), which)(head, x)
    expected = jax.grad(loss(plain), which)(head, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def low_rank(base: jax.Array, tied: bool | None = None) -> LoRAWeight:
    """An adapter that is not the identity; its rank is an integer leaf, which has no cotangent."""
    a = jax.random.normal(jax.random.key(2), (base.shape[0], 2))
    b = jax.random.normal(jax.random.key(3), (2, base.shape[1]))
    return LoRAWeight(base, a, b, jnp.float32(0.5), jnp.int32(2), tied=tied)


WEIGHTS = {
    "adapter and bias": lambda w: Affine(low_rank(w), jnp.ones(V)),
    "trained whole": lambda w: InPlace(w, w + 0.1),
    "tied adapter": lambda w: low_rank(w, tied=True),
    "tied, trained whole": lambda w: InPlace(w, w + 0.1, tied=True),
    "untied, adapted": lambda w: Untied(w, low_rank(w, tied=True)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_head_may_be_any_weight(name):
    """What it trains, and nothing else, gets the gradients of dense autodiff."""
    config = CONFIG if name in ("adapter and bias", "trained whole") else SHAPED["tied"]
    head, x, labels = example(config)
    trainable, frozen = tree.partition(made := WEIGHTS[name](head), tree.trainable_mask(made))

    def loss(trainable, x, score):
        return jnp.sum(score(config, tree.combine(trainable, frozen), x, labels)["logp"])

    def dense(config, head, x, labels):
        logits = verbs.unembed(head, x) if config.tie_embeddings else x @ head
        logp = jax.nn.log_softmax(logits)
        return {"logp": jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]}

    got, expected = (jax.grad(loss, (0, 1))(trainable, x, score) for score in (heads.token_scores, dense))
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(trainable)) + 1
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=0, atol=2e-5), got, expected)


def test_the_frozen_base_of_a_trained_head_has_no_gradient_at_all():
    """Not one that is made and dropped: no array of its shape in the compiled step but itself and its transpose."""
    config = dataclasses.replace(CONFIG, vocab_size=4099, hidden_size=512)
    x, labels = jax.ShapeDtypeStruct((1, 64, 512), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.int32)
    base = jax.ShapeDtypeStruct((512, 4099), jnp.float32)

    def loss(a, base, x, labels):
        head = LoRAWeight(base, a, jnp.ones((2, 4099)), jnp.float32(1), jnp.int32(2))
        return jnp.sum(heads.token_scores(config, head, x, labels)["logp"])

    a = jax.ShapeDtypeStruct((512, 2), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(a, base, x, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 4099 * 4


@pytest.mark.parametrize("length", [1, 7, 17])
@pytest.mark.parametrize("largest", [1, 2**28], ids=["a chunk a token", "few chunks"])
def test_any_length_and_any_chunk(length, largest, monkeypatch):
    monkeypatch.setattr(heads, "LOGIT_ELEMENTS", largest)
    head, x, labels = example(CONFIG)
    x, labels = x[:, :length], labels[:, :length]
    run = lambda score: jax.value_and_grad(lambda x: jnp.sum(score(CONFIG, head, x, labels)["logp"] ** 2))(x)  # noqa: E731
    for a, b in zip(run(heads.token_scores), run(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4)  # a sum of squares of order ten


def test_bfloat16():
    """Logits round to bfloat16 as in `transformers`, all after them is float32; gradients within 2 ulp of float32's."""
    head, x, labels = example(CONFIG)
    short = [a.astype(jnp.bfloat16) for a in (head, x)]
    exact = jax.nn.log_softmax((short[1] @ short[0]).astype(jnp.float32))
    got = heads.token_scores(CONFIG, *short, labels)["logp"]
    np.testing.assert_allclose(got, jnp.take_along_axis(exact, labels[..., None], -1)[..., 0], rtol=0, atol=1e-5)

    def loss(score):
        return lambda head, x: jnp.sum(score(CONFIG, head, x, labels)["logp"])

    truth = jax.grad(loss(plain), (0, 1))(*(a.astype(jnp.float32) for a in short))
    for which in ((0, 1), (1,)):
        for argument, grad in zip(which, jax.grad(loss(heads.token_scores), which)(*short), strict=True):
            assert grad.dtype == jnp.bfloat16
            error = np.abs(grad.astype(jnp.float32) - truth[argument]).max()
            assert error < 2 * 2.0**-8 * np.abs(truth[argument]).max()


def test_many_adapters_are_one_vmap():
    """Over the factors with the base and the hidden states shared, under jit: each as if alone."""
    head, x, labels = example(CONFIG)
    a, b = jax.random.normal(jax.random.key(2), (3, D, 2)), jax.random.normal(jax.random.key(3), (3, 2, V))

    def loss(factors, x):
        weight = LoRAWeight(head, *factors, jnp.float32(0.5), jnp.int32(2))
        return jnp.sum(heads.token_scores(CONFIG, weight, x, labels)["logp"])

    run = jax.value_and_grad(loss, (0, 1))
    got = jax.jit(jax.vmap(run, (0, None)))((a, b), x)
    for i in range(3):
        jax.tree.map(
            lambda p, q, i=i: np.testing.assert_allclose(p[i], q, rtol=1e-5, atol=5e-5), got, run((a[i], b[i]), x)
        )


@pytest.mark.parametrize("name", ["plain", "tied"])
@pytest.mark.parametrize("dims", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_under_a_mesh(name, dims):
    """As on one device; what the head's chunks share is exchanged before or after the loop over them, not in it."""
    config = dataclasses.replace(SHAPED[name], vocab_size=40)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]).reshape(dims), ("data", "fsdp", "tensor"))
    keys = jax.random.split(jax.random.key(0), 3)
    spec = ("tensor", "fsdp") if config.tie_embeddings else ("fsdp", "tensor")
    head = jax.random.normal(keys[0], (40, D) if config.tie_embeddings else (D, 40))
    x, labels = jax.random.normal(keys[1], (8, T, D)), jax.random.randint(keys[2], (8, T), 0, 40)

    def loss(on, head, x):
        return jnp.sum(heads.token_scores(config, head, x, labels, ("logp", "correct"), on)["logp"] ** 2)

    place = lambda a, *axes: jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))  # noqa: E731
    laid = place(head, *spec), place(x, ("data", "fsdp"))
    expected = jax.jit(jax.grad(functools.partial(loss, None), (0, 1)))(head, x)
    program = jax.jit(jax.grad(functools.partial(loss, mesh), (0, 1))).lower(*laid).compile()
    for got, want in zip(program(*laid), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)  # of order ten
    assert program.output_shardings[0].is_equivalent_to(laid[0].sharding, 2)
    looped = [line for line in program.as_text().splitlines() if re.search(r" (all-\w+|reduce-scatter)\(", line)]
    looped = [line for line in looped if "/while/" in line]
    assert not looped or dims[2] > 1
    for line in looped:  # the softmax over a shared vocabulary: a number a token, or the states' gradient
        assert not re.search(rf"\[({D}|{D // dims[1]}),({40 // dims[2]}|40)\]", line.split("channel_id")[0])
    odd = heads.token_scores(config, head, x[:3], labels[:3], mesh=mesh)["logp"]  # rows that do not divide
    np.testing.assert_allclose(odd, heads.token_scores(config, head, x[:3], labels[:3])["logp"], atol=1e-5)


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
