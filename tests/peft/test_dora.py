"""DoRA: gradients and dropout against torch, norms without a dense weight, over a base that stores fewer bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxft import peft as jaxft_peft
from jaxft.core import products, tree, verbs
from jaxft.core.names import Name
from jaxft.core.weight import Affine, Weight, weight
from jaxft.peft import DoRA, sites
from jaxft.peft.dora import DoRAWeight
from jaxft.testing import jaxprs
from tests.peft import gradients, pairs

L, D, F = 3, 20, 12
NAMES = (Name("layers/w", "layers.{}.w", "linear"),)

GRADIENTS = {
    "patterns": ("qwen2", DoRA(rank=4, alpha=3, targets=("q_proj", "up_proj"), rank_pattern={"1.mlp.up_proj": 2})),
    "tied": ("llama_tied", DoRA(rank=4, targets=("embed_tokens", "lm_head", "k_proj"))),
    "gpt2": ("gpt2", DoRA(rank=4, targets=("c_attn", "wte"))),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_one_step_equal_torch(case, tmp_path, key):
    name, config = GRADIENTS[case]
    gradients.equal_torch(name, pairs.adapted(name, config, key), tmp_path)


@weight
class Coarse(Weight):
    """A base of 8-bit codes [*stack, in, out] and one scale a layer: ``x @ (codes * scale)``."""

    codes: jax.Array
    scale: jax.Array
    adapter = False

    @property
    def shape(self):
        return self.codes.shape

    @property
    def dtype(self):
        return jnp.dtype("float32")

    def __rmatmul__(self, x):
        return x @ self.dense().astype(x.dtype)

    def dense(self):
        return self.codes * self.scale[..., None, None]


def coarse() -> Coarse:
    codes = jax.random.randint(jax.random.key(0), (L, D, F), -127, 128, jnp.int8)
    return Coarse(codes, jnp.array([0.01, 0.002, 0.005]))


@functools.cache
def plain() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (L, D, F)) / 4


def adapted(base: Any, config: DoRA, move: bool = True) -> Any:
    params = sites.adapt({"layers": {"w": base}}, NAMES, jax.random.key(1), config)
    return pairs.moved(params, jax.random.key(2))["layers"]["w"] if move else params["layers"]["w"]


@pytest.mark.parametrize("base", [plain, coarse])
def test_columns_have_the_trained_lengths(base):
    """Whatever the base: the columns of the dense weight are as long as the magnitudes, in V's directions."""
    w = adapted(base(), DoRA(rank=3, targets=("w",), alpha=5))
    dense = np.asarray(verbs.dense(w))
    np.testing.assert_allclose(np.linalg.norm(dense, axis=1), w.magnitude, rtol=1e-5)
    v = verbs.dense(base()) + w.scale[:, None, None] * w.a @ w.b
    np.testing.assert_allclose(dense, w.magnitude[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True), atol=1e-5)
    x = jax.random.normal(jax.random.key(3), (5, D))
    np.testing.assert_allclose(x @ w[1], x @ dense[1], rtol=1e-5, atol=1e-5)
    fresh = adapted(base(), DoRA(rank=3, targets=("w",)), move=False)
    np.testing.assert_allclose(x @ fresh[1], x @ verbs.dense(base())[1], rtol=1e-6, atol=1e-6)


def test_norms_cost_a_product_of_rank_width():
    """No product of the weight's shape forwards or backwards, and no norm but of the factors: W's are measured once."""
    w = adapted(plain(), DoRA(rank=3, targets=("w",)))[1]
    trainable, frozen = tree.partition(w, tree.trainable_mask(w))
    x = jnp.ones((5, D))
    made = jax.make_jaxpr(jax.grad(lambda t: jnp.sum(jnp.sin(x @ tree.combine(t, frozen)))))(trainable)
    done = [eqn for eqn in jaxprs.equations(made) if eqn.primitive.name != "stop_gradient"]  # which computes nothing
    shapes = {v.aval.shape for eqn in done for v in eqn.outvars}
    assert (D, F) not in shapes and (F, D) not in shapes and (3, F) in shapes


def test_on_an_adapter_that_trains_norms_follow_it():
    """The base of a nested one changes, so its norms are taken in every step."""
    inner = jaxft_peft.LoRA(rank=2, targets=("w",))
    params = sites.adapt({"layers": {"w": plain()}}, NAMES, jax.random.key(0), inner)
    w = pairs.moved(sites.adapt(params, NAMES, jax.random.key(1), DoRA(rank=3, targets=("w",))), jax.random.key(2))
    w = w["layers"]["w"]
    assert isinstance(w, DoRAWeight) and w.norms is None
    np.testing.assert_allclose(np.linalg.norm(verbs.dense(w), axis=1), w.magnitude, rtol=1e-5)
    x = jax.random.normal(jax.random.key(3), (5, D))
    np.testing.assert_allclose(x @ w[1], x @ verbs.dense(w)[1], rtol=1e-5, atol=1e-5)


def test_the_bias_is_not_scaled():
    base = Affine(plain(), jnp.ones((L, F)))
    w = adapted(base, DoRA(rank=3, targets=("w",)))
    assert isinstance(w, Affine) and isinstance(w.base, DoRAWeight)
    np.testing.assert_array_equal(jnp.zeros((2, D)) @ w[0], jnp.ones((2, F)))


def test_dropout_is_pefts():
    """The base sees the whole input and, times m / norm - 1, the dropped one; the factors the dropped one."""
    w = adapted(plain(), DoRA(rank=3, alpha=5, targets=("w",), dropout=0.4))
    w = tree.dropout_keys({"w": w}, jax.random.key(5))["w"][1]
    x = jax.random.normal(jax.random.key(3), (6, D))
    dropped = np.array(products.dropped(x, w.key, w.rate))
    assert 0.1 < (dropped == 0).mean() < 0.7

    class Dropped(torch.nn.Module):
        def forward(self, x):
            return torch.tensor(dropped)

    linear = torch.nn.Linear(D, F, bias=False)
    linear.weight.data = torch.tensor(np.array(plain()[1].T))
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.4, use_dora=True, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, torch.nn.Sequential(linear))[0]
    layer.lora_dropout["default"] = Dropped()
    layer.lora_A["default"].weight.data = torch.tensor(np.array(w.a.T))
    layer.lora_B["default"].weight.data = torch.tensor(np.array(w.b.T))
    layer.lora_magnitude_vector["default"].weight.data = torch.tensor(np.array(w.magnitude))
    expected = layer.train()(torch.tensor(np.array(x))).detach().numpy()
    np.testing.assert_allclose(x @ w, expected, rtol=1e-5, atol=1e-5)
    evaluated = x @ dataclasses.replace(w, key=None)
    np.testing.assert_allclose(
        evaluated, layer.eval()(torch.tensor(np.array(x))).detach().numpy(), rtol=1e-5, atol=1e-5
    )


def test_a_column_of_zeros_stays_one():
    base = plain().at[:, :, 4].set(0.0)
    w = adapted(base, DoRA(rank=3, targets=("w",)), move=False)
    x = jax.random.normal(jax.random.key(3), (5, D))
    np.testing.assert_allclose(x @ w[1], x @ base[1], rtol=1e-6, atol=1e-6)


def test_what_it_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"peft.lora_bias: got true; expected false"):
        DoRA(lora_bias=True)
    with pytest.raises(ValueError, match=r"peft.ensure_weight_tying: model.embed_tokens has one length a feature"):
        config = DoRA(targets=("embed_tokens",), ensure_weight_tying=True)
        jaxft_peft.adapt(pairs.model("llama_tied"), jax.random.key(0), config)
