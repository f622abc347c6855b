"""What the conformance checks look at: a stack of layers of one kind of Weight, before and after a little training."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import peft
from jaxft.core import tree, verbs
from jaxft.core.names import Name
from jaxft.core.weight import Affine, Untied, Weight

LAYERS, IN, OUT = 3, 10, 14
LINEAR = (Name("layers/w", "layers.{}.w", "linear"), Name("head", "lm_head", "linear"))
F32 = jnp.dtype("float32")

Build = Callable[[jax.Array, Any], Weight]


@dataclass(frozen=True)
class Row:
    """One kind of Weight, or one nesting, and what holds for it."""

    build: Build
    """A stack ``[LAYERS, in, out]`` at initialisation, from a key and the dtype of the base."""
    identity: bool = True
    """Whether it equals the stripped weight at initialisation."""
    matrix: bool = True
    """Whether it is ``x @ dense + constant``."""
    dense_gradient: bool = False
    """Whether a matrix of the weight's own shape trains, or is needed to compute the map."""
    embedding: bool = False
    """Whether `take` and `unembed` are defined."""
    experts: bool = True
    """Whether it may hold experts: `ragged_dot`, where it is defined, is that of each expert."""
    left_out: tuple[int, ...] = ()
    """Layers that the method was told not to adapt."""


class Subject:
    """One row, with what several checks need of it made once."""

    def __init__(self, row: Row):
        self.row, self.key = row, jax.random.key(0)

    @functools.cached_property
    def fresh(self) -> Weight:
        """The stack at initialisation."""
        return self.row.build(self.key, F32)

    @functools.cached_property
    def stack(self) -> Weight:
        """The stack off its initialisation."""
        return trained(self.fresh, jax.random.key(7))

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out) of one layer."""
        return self.fresh.shape[-2], self.fresh.shape[-1]

    @functools.cached_property
    def x(self) -> jax.Array:
        """Inputs float32[2, 3, in]."""
        return jax.random.normal(jax.random.fold_in(self.key, 3), (2, 3, self.sizes[0]))

    @property
    def trains(self) -> bool:
        """Whether anything of it trains."""
        return bool(jax.tree.leaves(split(self.fresh)[0]))


def normal(key: jax.Array, dtype: Any, *shape: int) -> jax.Array:
    """Random numbers of deviation 1/4."""
    return jax.random.normal(key, shape).astype(dtype) / jnp.asarray(4, dtype)


def matrix(key: jax.Array, dtype: Any, sizes: tuple[int, int] = (IN, OUT)) -> jax.Array:
    """A plain stack of matrices."""
    return normal(key, dtype, LAYERS, *sizes)


def affine(key: jax.Array, dtype: Any, sizes: tuple[int, int] = (IN, OUT)) -> Affine:
    """A stack of matrices with biases."""
    return Affine(matrix(key, dtype, sizes), normal(jax.random.fold_in(key, 9), dtype, LAYERS, sizes[1]))


def adapted(base: Callable, *configs: Any, sizes: tuple[int, int] = (IN, OUT)) -> Build:
    """The base with a method, or with several in turn."""

    def build(key: jax.Array, dtype: Any) -> Weight:
        params = {"layers": {"w": base(key, dtype, sizes)}, "head": jnp.zeros((sizes[1], sizes[1]), dtype)}
        for i, config in enumerate(configs):
            params = peft.method_of(config).adapt(params, LINEAR, jax.random.fold_in(key, i), config)
        return params["layers"]["w"]

    return build


def trained(w: Weight, key: jax.Array, steps: int = 2) -> Weight:
    """The weight after some steps of sign descent on a random target: off its initialisation, its invariants kept."""
    if not any(jax.tree.leaves(mask(w))):
        return w
    trainable, frozen = tree.partition(w, mask(w))
    x = jax.random.normal(key, (5, w.shape[-2])).astype(w.dtype)
    features = jax.random.normal(jax.random.fold_in(key, 2), (5, w.shape[-1])).astype(w.dtype)
    target = jax.random.normal(jax.random.fold_in(key, 1), (LAYERS, 5, w.shape[-1]))

    @jax.jit
    @jax.grad
    def gradient(trainable):
        whole = tree.combine(trainable, frozen)
        y = jnp.stack([x @ whole[i] for i in range(LAYERS)])
        loss = jnp.sum((y.astype(jnp.float32) - target) ** 2)
        if isinstance(w, Untied):  # only the look-up is a product: its head must move as well
            logits = jnp.stack([verbs.unembed(whole[i], features) for i in range(LAYERS)])
            loss += jnp.sum(jnp.sin(logits.astype(jnp.float32)))
        return loss

    for _ in range(steps):
        trainable = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), trainable, gradient(trainable))
    return tree.combine(trainable, frozen)


def mask(w: Weight) -> Any:
    """What trains; nothing does in the model's own weights."""
    try:
        return tree.trainable_mask(w)
    except ValueError:
        return jax.tree.map(lambda _: False, w)


def split(w: Weight) -> tuple[Any, Any]:
    """The weight's (trainable, frozen) parts."""
    return tree.partition(w, mask(w))
