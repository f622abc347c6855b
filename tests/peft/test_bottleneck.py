"""Bottleneck adapters against the equations of AdapterHub, written in torch on `transformers` models."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft import peft
from jaxft.core import tree
from jaxft.core.weight import NotMergeable
from jaxft.models import decoder, heads
from jaxft.models.decoder import Execution
from jaxft.peft import Houlsby, Parallel, Pfeiffer
from jaxft.peft.bottleneck import Bottleneck
from jaxft.sharding import rules
from tests.peft import pairs

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CASES = {
    "houlsby": Houlsby(reduction_factor=4),
    "pfeiffer": Pfeiffer(reduction_factor=4, layers=(0, 2)),
    "parallel": Parallel(reduction_factor=3, activation="gelu"),
}
TORCH = {"relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}


@functools.cache
def adapted(name: str, model: str = "llama"):
    """A model with adapters as training could have left them."""
    return pairs.moved(peft.adapt(pairs.model(model), jax.random.key(1), CASES[name]), jax.random.key(2))


def network(w, layer: int):
    """`Adapter.forward` of AdapterHub without its residual: scaling * up(act(down(x)))."""
    down, down_bias, up, up_bias = (torch.tensor(np.asarray(a[layer])) for a in (w.down, w.down_bias, w.up, w.up_bias))
    scale = float(w.scale[layer]) * float(w.gate[layer])
    return lambda h: scale * (TORCH[w.activation](h @ down + down_bias) @ up + up_bias)


def hooked(name: str, model: str):
    """The `transformers` model with the networks where AdapterHub has them; ``model``: llama, or gpt_neox, whose two
    blocks both read the layer's input."""
    params, torch_model = adapted(name, model), pairs.torch_model(model)
    stack = params["layers"]
    parts = {
        "llama": ("self_attn.o_proj", "mlp.down_proj", "mlp"),
        "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h", "mlp"),
    }[model]
    layers = torch_model.model.layers if model == "llama" else torch_model.gpt_neox.layers
    for i, layer in enumerate(layers):
        if name == "houlsby":
            for module, w in zip(parts[:2], (stack["attn"]["o"], stack["mlp"]["down"]), strict=True):
                f = network(w, i)
                layer.get_submodule(module).register_forward_hook(lambda m, a, y, f=f: y + f(y))
        elif name == "pfeiffer":
            f = network(stack["adapter"], i)
            layer.register_forward_hook(lambda m, a, y, f=f: y + f(y))
        else:
            f, seen = network(stack["parallel_adapter"], i), {}
            if model == "llama":
                norm = layer.post_attention_layernorm
                norm.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(x=a[0]))
            else:
                layer.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(input=a[0]))
                layer.attention.register_forward_hook(lambda m, a, y, seen=seen: seen.update(x=seen["input"] + y[0]))
            layer.register_forward_hook(lambda m, a, y, f=f, seen=seen: y + f(seen["x"]))
    return torch_model.eval()


@pytest.mark.parametrize("model", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_equations(name, model):
    params = adapted(name, model)
    expected = pairs.torch_logits(hooked(name, model))
    got = pairs.logits(model, params)
    assert np.abs(got - pairs.logits(model, pairs.ours(model).params)).max() > 1e-2
    chex.assert_trees_all_close(got, expected, **CLOSE)
    chex.assert_trees_all_equal(pairs.logits(model, tree.strip(params)), pairs.logits(model, pairs.ours(model).params))


def count(params):
    return tree.count(tree.partition(params, tree.trainable_mask(params))[0])


def test_parameter_counts():
    """2 D r + r + D for each network, D = 32, three layers."""
    for config, networks in ((Houlsby(), 6), (Pfeiffer(), 3), (Parallel(), 3)):
        r = int(32 // config.reduction_factor)
        params = peft.adapt(pairs.model("llama"), jax.random.key(0), config)
        assert count(params) == networks * (2 * 32 * r + r + 32)
    narrow = peft.adapt(pairs.model("llama"), jax.random.key(0), Pfeiffer(reduction_factor=1000))
    assert narrow["layers"]["adapter"].down.shape == (3, 32, 1)


def test_initialisation():
    """AdapterHub's `bert` (normal, deviation 0.02) and `mam_adapter` (uniform within 1/sqrt(in), then zero)."""
    key = jax.random.key(0)
    w = peft.adapt(pairs.model("llama"), key, Pfeiffer(reduction_factor=1))["layers"]["adapter"]
    for drawn in (w.down, w.up):
        assert abs(float(jnp.std(drawn)) / 0.02 - 1) < 0.05 and abs(float(jnp.mean(drawn))) < 2e-3
    assert not np.any(w.down_bias) and not np.any(w.up_bias)
    w = peft.adapt(pairs.model("llama"), key, Parallel(reduction_factor=1))["layers"]["parallel_adapter"]
    bound = 1 / math.sqrt(32)
    assert float(jnp.abs(w.down).max()) <= bound and abs(float(jnp.std(w.down)) * math.sqrt(3) / bound - 1) < 0.05
    assert not np.any(w.up) and not np.array_equal(w.down[0], w.down[1])
    base = pairs.logits("llama", pairs.ours("llama").params)
    for config in (Parallel(), Houlsby(init="zero"), Pfeiffer(init="zero")):
        start = peft.adapt(pairs.model("llama"), key, config)
        chex.assert_trees_all_equal(pairs.logits("llama", start), base)
    near = pairs.logits("llama", peft.adapt(pairs.model("llama"), key, Houlsby()))
    assert 0 < np.abs(near - base).max() < 1e-2


def loss(trainable, frozen, execution=decoder.DEFAULT):
    config, params = pairs.ours("llama").config, tree.combine(trainable, frozen)
    hidden, _, _ = decoder.forward(config, params, jnp.asarray(pairs.TOKENS), execution=execution)
    return jnp.mean(heads.logits(config, heads.head_of(config, params), hidden) ** 2)


@pytest.mark.parametrize("name", ["pfeiffer", "parallel"])
def test_a_slot_is_like_any_weight(name):
    """Unrolled from split layers, rematerialised, on a mesh, dropped out: the same gradients, or none."""
    params = adapted(name)
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    grads = gradient(trainable, frozen, decoder.DEFAULT)
    w = grads["layers"][CASES[name].slot]
    if name == "pfeiffer":
        assert all(not np.any(a[1]) and np.any(a[0]) and np.any(a[2]) for a in jax.tree.leaves(w))
    split = gradient(trainable, tree.split_layers(frozen), Execution(remat="save"))
    chex.assert_trees_all_close(split, grads, **CLOSE)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = tree.partition(rules.shardings(params, mesh), tree.trainable_mask(params))
    on_mesh = gradient(jax.device_put(trainable, places[0]), jax.device_put(frozen, places[1]), Execution(mesh=mesh))
    chex.assert_trees_all_close(on_mesh, grads, **CLOSE)


def test_dropout_drops_what_is_added():
    w = adapted("parallel")["layers"]["parallel_adapter"]
    w = dataclasses.replace(w, rate=0.5)
    x = jnp.ones((4000, 32))
    keyed = tree.dropout_keys({"w": w}, jax.random.key(0))["w"]
    assert keyed.key.shape == (3,)
    y, whole = x @ keyed[0], x @ w[0]
    kept = y != 0
    chex.assert_trees_all_close(jnp.where(kept, y, 0), jnp.where(kept, 2 * whole, 0), rtol=1e-5)
    assert abs(float(jnp.mean(kept)) - 0.5) < 0.01


def test_what_cannot_be_is_refused():
    for name, where in (("houlsby", "layers/attn/o"), ("pfeiffer", "layers/adapter")):
        with pytest.raises(NotMergeable, match=where):
            tree.merge(adapted(name))
    with pytest.raises(ValueError, match=r"layers: got \[3\]; expected indices from 0 to 2"):
        peft.adapt(pairs.model("llama"), jax.random.key(0), Pfeiffer(layers=(3,)))
    with pytest.raises(ValueError, match="layers/adapter already"):
        peft.adapt(pairs.model("llama"), jax.random.key(0), [Pfeiffer(), Pfeiffer()])
    with pytest.raises(ValueError, match="reduction_factor: got 0"):
        Houlsby(reduction_factor=0)
    both = peft.adapt(pairs.model("llama"), jax.random.key(0), [Pfeiffer(), Parallel()])["layers"]
    assert isinstance(both["adapter"], Bottleneck) and isinstance(both["parallel_adapter"], Bottleneck)
