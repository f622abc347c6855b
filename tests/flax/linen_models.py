"""Linen models in the ways that Flax users write them: what the bridge is tested on.

`Transformer` is put together from Flax's published parts in the manner of its lm1b example; `EinMix` is einops' own
layer, whose kernel stands on the left of the product; `T5Dense` is how T5X stores a kernel: flat, reshaped where it is
used, the layers on axis 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops.layers.flax import EinMix
from flax import linen as nn

from jaxft.peft import METHODS, Method, Targeted


class Mlp(nn.Module):
    """Dense with and without bias, DenseGeneral over several axes, and one module used twice."""

    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(6, name="twice")
        x = twice(nn.tanh(twice(x)))
        x = nn.DenseGeneral((3, 4), use_bias=False, name="split")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="join")(nn.tanh(x))
        return nn.Dense(7, use_bias=False, name="out")(x)


class Block(nn.Module):
    """A transformer layer that `nn.scan` can stack."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, deterministic):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        attention = nn.MultiHeadDotProductAttention(2, dtype=self.dtype, deterministic=deterministic, name="attention")
        x = x + attention(y, mask=nn.make_causal_mask(jnp.ones(x.shape[:2])))
        y = nn.Dense(12, dtype=self.dtype, name="up")(nn.LayerNorm(dtype=self.dtype)(x))
        y = nn.Dropout(0.5, deterministic=deterministic)(nn.gelu(y))
        return x + nn.Dense(8, dtype=self.dtype, name="down")(y), None


class Transformer(nn.Module):
    """An embedding that is also the head, learned positions, layers stacked by scan and rematerialised."""

    dtype: Any = None

    @nn.compact
    def __call__(self, ids, deterministic=True):
        embed = nn.Embed(11, 8, dtype=self.dtype, name="embed")
        positions = self.param("positions", nn.initializers.normal(0.1), (16, 8))
        x = embed(ids) + positions[: ids.shape[1]]
        stacked = nn.scan(
            nn.remat(Block, static_argnums=(2,)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = stacked(self.dtype, name="layers")(x, deterministic)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


class Convolutions(nn.Module):
    """Strided, dilated and one-dimensional convolutions, and statistics that a call changes."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), strides=2, name="patch")(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train)(x))
        x = x.reshape(x.shape[0], -1, 6)
        x = nn.Conv(5, (3,), kernel_dilation=2, padding="VALID", use_bias=False, name="line")(x)
        return nn.Dense(3, name="head")(x.mean(1))


class Einsums(nn.Module):
    """Kernels whose inputs are not their first axis, and a parameter multiplied by hand."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((3, 5, 4), "btd,ndh->btnh", name="heads")(x)
        x = nn.Einsum((3, 4, 6), "btnh,nhd->btd", use_bias=False, name="merge")(nn.tanh(x))
        w = self.param("w", nn.initializers.lecun_normal(), (7, 6))
        return nn.tanh(x) @ w.T


class T5Dense(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, _):
        n, d = self.heads, x.shape[-1]
        up = jnp.asarray(self.param("up", nn.initializers.lecun_normal(), (d, 12)), x.dtype).reshape(d, n, 12 // n)
        y = jnp.einsum("btd,dnh->btnh", x, up)
        down = self.param("down", nn.initializers.lecun_normal(), (12, d)).reshape(n, 12 // n, d)
        return x + jax.lax.dot_general(jnp.tanh(y), down, (((2, 3), (0, 1)), ((), ()))), None


class T5(nn.Module):
    @nn.compact
    def __call__(self, x):
        stacked = nn.scan(
            T5Dense, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=nn.broadcast, length=2
        )
        return stacked(3, name="layers")(x, None)[0]


class Experts(nn.Module):
    """One kernel for each member of a batch: lifted vmap, and DenseGeneral's batch axes."""

    @nn.compact
    def __call__(self, x):
        each = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0)
        x = each(6, name="mapped")(x)
        return nn.DenseGeneral(5, batch_dims=(0,), name="batched")(nn.tanh(x))


class Partitioned(nn.Module):
    """Kernels in boxes that name their axes."""

    @nn.compact
    def __call__(self, x):
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(5, kernel_init=boxed, name="out")(nn.tanh(nn.Dense(6, kernel_init=boxed, name="up")(x)))


class Case(NamedTuple):
    model: nn.Module
    example: Callable[[], Any]
    targets: str | tuple[str, ...]
    adapted: dict[str, tuple[int, ...]]
    """Shapes of A by the path of what is adapted, with rank 2."""


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def ids() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 5)))


def methods_that_wrap() -> list[str]:
    """Rows of `METHODS` for any Flax model: those that wrap weights and need no hook in the training loop."""
    rows = [n for n, row in METHODS.items() if issubclass(row.config, Targeted) and row.hooks is Method.hooks]
    return [n for n in rows if n != "bitfit"]  # which trains the model's own


LAYERS = {f"layers/attention/{name}/kernel": (3, 8, 2) for name in ("query", "key", "value", "out")}
CASES = {
    "mlp": Case(
        Mlp(),
        lambda: numbers(4, 6),
        "all-linear",
        {"twice/kernel": (6, 2), "split/kernel": (6, 2), "join/kernel": (12, 2), "out/kernel": (5, 2)},
    ),
    "transformer": Case(
        Transformer(),
        ids,
        ("attention.query", "out", "value", "key", "up", "down", "embed"),
        LAYERS | {"layers/up/kernel": (3, 8, 2), "layers/down/kernel": (3, 12, 2), "embed/embedding": (11, 2)},
    ),
    "convolutions": Case(
        Convolutions(),
        lambda: numbers(2, 6, 6, 4),
        ("patch", "line", "head"),
        {"patch/kernel": (36, 2), "line/kernel": (18, 2), "head/kernel": (5, 2)},
    ),
    "einsums": Case(
        Einsums(),
        lambda: numbers(2, 3, 5),
        "all-linear",
        {"heads/kernel": (5, 2), "merge/kernel": (12, 2), "w": (6, 2)},
    ),
    "t5": Case(T5(), lambda: numbers(2, 4, 8), "all-linear", {"layers/up": (2, 8, 2), "layers/down": (2, 12, 2)}),
    "einmix": Case(
        EinMix("b t (h d) -> b (k e) t", "h d k e", "k e", sizes={"h": 2, "d": 3, "k": 4, "e": 5}),
        lambda: numbers(2, 7, 6),
        "all-linear",
        {"weight": (6, 2)},
    ),
    "experts": Case(
        Experts(),
        lambda: numbers(3, 4, 7),
        "all-linear",
        {"mapped/kernel": (3, 7, 2), "batched/kernel": (3, 6, 2)},
    ),
    "partitioned": Case(Partitioned(), lambda: numbers(4, 3), ("up",), {"up/kernel/value": (3, 2)}),
}
