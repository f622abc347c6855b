"""A jaxft model as a linen and as an NNX module: the same logits, and adapters in its tree train."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxft
from jaxft.flax import linen as linen_bridge
from jaxft.flax import nnx as nnx_bridge
from jaxft.flax.nnx import Adapter, Constant
from jaxft.model import Model
from jaxft.models import decoder, families, heads, init
from tests.models import tiny


@functools.cache
def model(family: str) -> Model:
    raw = getattr(tiny, family)().to_dict()
    config, names = families.read(raw, "config.json")
    return Model(config, init.random(config, names, jax.random.key(0), jnp.float32, 0.2), names, raw)


def adapted(of: Model):
    params = jaxft.peft.adapt(of, jax.random.key(1), jaxft.peft.LoRA(rank=2, targets="all-linear"))
    trainable, frozen = jaxft.partition(params, jaxft.trainable_mask(params))
    return jaxft.combine(jax.tree.map(lambda a: a + 0.1, trainable), frozen)


@functools.partial(jax.jit, static_argnums=0)
def logits(of, params, tokens, segments):
    hidden, _, _ = decoder.forward(of.config, params, tokens, None, segments)
    return heads.logits(of.config, heads.head_of(of.config, params), hidden)


def batch():
    tokens = np.random.default_rng(0).integers(0, 97, (2, 7))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray([[1, 1, 1, 2, 2, 2, 0], [1] * 7], jnp.int32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linen(family):
    of, (tokens, segments) = model(family), batch()
    module, variables = linen_bridge.from_model(of)
    run = jax.jit(module.apply)
    expected = logits(of, of.params, tokens, segments)
    chex.assert_trees_all_close(run(variables, tokens, segments=segments), expected, atol=1e-5)
    params = adapted(of)
    got = run({"params": params}, tokens, segments=segments)
    chex.assert_trees_all_close(got, logits(of, params, tokens, segments), atol=1e-5)
    fresh = jax.eval_shape(module.init, jax.random.key(0), tokens)
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, jax.eval_shape(lambda: variables))


def test_linen_as_a_part_of_a_larger_module():
    of, (tokens, _) = model("llama"), batch()

    class Scored(nn.Module):
        model: nn.Module

        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(1)(self.model(tokens))

    whole = Scored(linen_bridge.from_model(of)[0])
    variables = jax.jit(whole.init)(jax.random.key(0), tokens)
    variables = {"params": {**variables["params"], "model": adapted(of)}}
    assert jax.jit(whole.apply)(variables, tokens).shape == (2, 7, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nnx(family):
    of, (tokens, segments) = model(family), batch()
    call = nnx.jit(lambda module: module(tokens, segments=segments))
    plain = nnx_bridge.from_model(of)
    chex.assert_trees_all_close(call(plain), logits(of, of.params, tokens, segments), atol=1e-5)
    assert not jax.tree.leaves(nnx.state(plain, (Adapter, Constant)))
    params = adapted(of)
    module = nnx_bridge.from_model(of, params)
    chex.assert_trees_all_close(call(module), logits(of, params, tokens, segments), atol=1e-5)
    chex.assert_trees_all_equal(module.params.tree(), params)


def test_nnx_trains_the_adapter_alone():
    of, (tokens, _) = model("llama"), batch()
    module = nnx_bridge.from_model(of, adapted(of))
    trainable, _ = jaxft.partition(module.params.tree(), jaxft.trainable_mask(module.params.tree()))
    _, found, own, rest = nnx.split(module, Adapter, nnx.Param, ...)
    sizes = [sum(a.size for a in jax.tree.leaves(state)) for state in (found, own)]
    assert sizes == [jaxft.core.tree.count(trainable), jaxft.core.tree.count(of.params)]
    assert {type(v) for _, v in nnx.to_flat_state(rest)} == {Constant}
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=Adapter)

    @nnx.jit
    def step(module, optimizer):
        def loss(module):
            return optax.softmax_cross_entropy_with_integer_labels(module(tokens)[:, :-1], tokens[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, Adapter))(module)
        optimizer.update(module, gradients)
        return value

    losses = [float(step(module, optimizer)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    chex.assert_trees_all_equal(jaxft.strip(module.params.tree()), of.params)
