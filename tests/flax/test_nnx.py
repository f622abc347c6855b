"""Methods on NNX models: the same numbers as the plain model that merging gives, in NNX's own ways of training."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxft.core import tree
from jaxft.flax import nnx as bridge
from jaxft.flax.nnx import Adapted, Adapter, Constant
from jaxft.peft import METHODS, LoRA
from jaxft.testing import jaxprs

KEY = jax.random.key(1)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, use_bias=False, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return self.drop(x + self.down(nnx.gelu(self.up(x))))


class Transformer(nnx.Module):
    """Layers in a list and layers stacked for a scan, a tied head, a convolution, counted calls."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.first = nnx.List([Block(rngs)])
        self.rest = nnx.vmap(Block)(rngs.split(3))
        self.mix = nnx.Conv(8, 8, (3,), padding="CAUSAL", rngs=rngs)
        self.split = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
        self.join = nnx.Einsum("btnh,nhd->btd", (2, 3, 8), (8,), rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def features(self, ids):
        self.calls[...] += 1
        x = self.embed(ids)
        for block in self.first:
            x = block(x)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def layers(block, x):
            return block(x)

        return self.mix(layers(self.rest, x))

    def __call__(self, ids):
        return self.embed.attend(self.join(nnx.tanh(self.split(self.features(ids)))))


TARGETS = ("query", "out", "up", "down", "embed", "mix", "split", "join")
STACKED = {f"rest/{name}/kernel" for name in ("attention/query", "attention/out", "up", "down")}
PATHS = STACKED | {path.replace("rest", "first/0") for path in STACKED}
PATHS |= {"embed/embedding", "mix/kernel", "split/kernel", "join/kernel"}


def ids():
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 5)))


def plain() -> Transformer:
    model = Transformer(nnx.Rngs(0))
    model.eval()
    return model


@functools.cache
def start():
    return nnx.split(bridge.adapt(plain(), KEY, LoRA(rank=2, targets=TARGETS), ids()))


def adapted() -> Adapted:
    """A fresh copy, to be changed at will."""
    return nnx.merge(*start(), copy=True)


def move(model) -> None:
    """Adapters away from the identity."""
    state = nnx.state(model, Adapter)
    nnx.update(model, jax.tree.map(lambda a: a + 0.1 * jax.random.normal(KEY, a.shape), state))


call = nnx.jit(lambda model, ids: model(ids))


def test_starts_as_the_model_and_keeps_its_parameters():
    model = plain()
    made = bridge.adapt(model, KEY, LoRA(rank=2, targets=TARGETS), ids())
    assert set(made.adapters) == PATHS
    assert made.adapters["rest/attention/out/kernel"].arrays["base/a"].shape == (3, 8, 2)
    assert made.model is model
    expected = call(model, ids())
    chex.assert_trees_all_close(call(made, ids()), expected, atol=1e-6)


def test_equals_the_merged_model_which_is_a_copy():
    model = adapted()
    move(model)
    got, merged = call(model, ids()), bridge.merge(model)
    chex.assert_trees_all_close(got, call(merged, ids()), atol=2e-5)
    base = call(model.model, ids())
    assert float(jnp.abs(got - base).max()) > 1e-2
    assert isinstance(merged, Transformer) and nnx.graphdef(merged) == nnx.graphdef(model.model)


def test_gradients_are_those_of_the_merged_model_with_nothing_dense():
    model = adapted()
    move(model)
    graph, trained, rest = nnx.split(model, Adapter, ...)

    def loss(through, trained):
        return jnp.square(through(nnx.merge(graph, trained, rest, copy=True))(ids())).mean()

    factored, dense = functools.partial(loss, lambda m: m), functools.partial(loss, bridge.merge)
    got, expected = jax.jit(jax.grad(factored))(trained), jax.jit(jax.grad(dense))(trained)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)
    program = jax.make_jaxpr(jax.grad(factored))(trained)
    for sizes in ((24, 8), (8, 12), (12, 8), (11, 8), (8, 6), (6, 8)):
        assert not jaxprs.matrix_products(program, sizes), sizes


def test_training_with_nnx():
    """nnx.Optimizer and DiffState take the adapter by its type, and nothing else moves."""
    model = adapted()
    before = nnx.to_pure_dict(nnx.state(model.model, nnx.Param))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=Adapter)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(ids())
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids()[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, Adapter))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert int(model.calls[...]) == 5
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model.model, nnx.Param)), before)
    kinds = {type(v) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))}
    assert kinds == {Adapter, Constant, nnx.Param, nnx.Variable}


def test_methods_and_data_are_the_models_and_parts_are_refused():
    model = adapted()
    move(model)
    merged = bridge.merge(model)
    features = nnx.jit(lambda model: model.features(ids()))
    chex.assert_trees_all_close(features(model), features(merged), atol=2e-5)
    assert model.calls is model.model.calls and int(model.calls[...]) == 1
    with pytest.raises(AttributeError, match="'mix' is a part of the model"):
        model.mix(jnp.ones((1, 2, 8)))
    with pytest.raises(AttributeError, match="'first' is a part of the model"):
        model.first[0](jnp.ones((1, 2, 8)))
    with pytest.raises(AttributeError, match="nothing_such"):
        model.nothing_such  # noqa: B018


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(6, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        x = self.norm(self.linear(x))
        self.seen = nnx.Intermediate(x)
        return self.drop(x, rngs=rngs)


def test_what_a_call_changes_is_changed():
    """Statistics, keys of the model and of an argument, and variables that are new."""
    x, rngs, same = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32), nnx.Rngs(3), nnx.Rngs(3)
    model = Noisy(nnx.Rngs(0))
    expected = nnx.clone(model)
    made = bridge.adapt(model, KEY, LoRA(rank=2), x, rngs=nnx.Rngs(3))
    chex.assert_trees_all_close(made(x, rngs=rngs), expected(x, rngs=same), atol=1e-6)
    chex.assert_trees_all_close(model.norm.mean[...], expected.norm.mean[...], atol=1e-6)
    chex.assert_trees_all_equal(rngs.default.count[...], same.default.count[...])
    chex.assert_trees_all_close(model.seen[...], expected.seen[...], atol=1e-6)


def test_adapter_dropout_follows_train_and_eval():
    x = jnp.ones((4, 6))
    made = bridge.adapt(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), KEY, LoRA(rank=2, dropout=0.5, targets=("kernel",)), x)
    move(made)
    first, second = made(x), made(x)
    assert float(jnp.abs(first - second).max()) > 1e-3
    made.eval()
    chex.assert_trees_all_close(made(x), bridge.merge(made)(x), atol=1e-6)


@pytest.mark.parametrize(
    "config", [METHODS[name].config for name in ("lora", "ia3", "houlsby")] + [functools.partial(LoRA, lora_bias=True)]
)
def test_methods_inside_and_around_the_bias(config):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    model.bias[...] = jnp.arange(5.0)
    made = bridge.adapt(model, KEY, config(targets=("kernel",)), x)
    move(made)
    assert float(jnp.abs(made(x) - model(x)).max()) > 1e-3
    if made.adapters["kernel"].tree().base.mergeable:
        chex.assert_trees_all_close(made(x), bridge.merge(made)(x), atol=1e-5)


def test_saved_and_loaded(tmp_path):
    model = adapted()
    move(model)
    bridge.save(model, tmp_path / "adapter")
    loaded = bridge.load(plain(), tmp_path / "adapter")
    states = [nnx.to_pure_dict(nnx.state(m, (Adapter, Constant))) for m in (loaded, model)]
    chex.assert_trees_all_equal(*states)
    assert loaded.adapters["rest/up/kernel"].structure == model.adapters["rest/up/kernel"].structure


def test_an_example_may_be_any_use_of_the_model():
    made = bridge.adapt(plain(), KEY, LoRA(rank=2, targets=("up",)), ids(), call="features")
    assert set(made.adapters) == {"first/0/up/kernel", "rest/up/kernel"}

    def both(model, ids):
        return model.features(ids), model.split(jnp.ones((1, 8)))

    assert set(bridge.adapt(plain(), KEY, LoRA(targets=("split",)), ids(), call=both).adapters) == {"split/kernel"}


def test_adapting_twice_and_shapes_only():
    model = adapted()
    move(model)
    shape = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    again = bridge.adapt(model, KEY, LoRA(rank=3, targets=("up",)), shape)
    assert tree.count(nnx.state(again, Adapter)) - tree.count(nnx.state(model, Adapter)) == 4 * 3 * (8 + 12)
    chex.assert_trees_all_close(call(again, ids()), call(model, ids()), atol=1e-6)
