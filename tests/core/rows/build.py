"""What rows of the conformance table are built from: bases, and the walk of a method's own ``adapt``.

A row builds a *stack* of layers at initialisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import peft
from jaxft.core.names import Name
from jaxft.core.weight import Affine, Weight

LAYERS, IN, OUT = 3, 10, 14
LINEAR = (Name("layers/w", "layers.{}.w", "linear"), Name("head", "lm_head", "linear"))
EMBEDDING = (Name("embed/tokens", "embed", "embedding"), Name("layers/w", "layers.{}.w", "linear"))

Build = Callable[[jax.Array, jnp.dtype], Weight]


@dataclass(frozen=True)
class Row:
    """One kind of Weight, or one nesting, and what holds for it."""

    build: Build
    """A stack ``[LAYERS, IN, OUT]`` at initialisation, from a key and the dtype of the base."""
    identity: bool = True
    """Whether it equals the stripped weight at initialisation."""
    matrix: bool = True
    """Whether it is ``x @ dense + constant``."""
    dense_gradient: bool = False
    """Whether a matrix of the weight's own shape trains."""
    embedding: bool = False
    """Whether `take` and `unembed` are defined."""
    experts: bool = True
    """Whether `ragged_dot` is defined."""


def normal(key: jax.Array, dtype: jnp.dtype, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape).astype(dtype) / jnp.asarray(4, dtype)


def matrix(key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A plain stack of matrices."""
    return normal(key, dtype, LAYERS, IN, OUT)


def affine(key: jax.Array, dtype: jnp.dtype) -> Affine:
    return Affine(matrix(key, dtype), normal(jax.random.fold_in(key, 9), dtype, LAYERS, OUT))


def adapted(base: Callable, *configs: Any) -> Build:
    """The base with a method, or with several in turn."""

    def build(key: jax.Array, dtype: jnp.dtype) -> Weight:
        params = {"layers": {"w": base(key, dtype)}, "head": jnp.zeros((OUT, OUT), dtype)}
        for i, config in enumerate(configs):
            params = peft.method_of(config).adapt(params, LINEAR, jax.random.fold_in(key, i), config)
        return params["layers"]["w"]

    return build


def embedding(config: Any, tied: bool) -> Build:
    """A stack of adapted embeddings; ``tied``: the model has no head of its own."""

    def one(key: jax.Array, dtype: jnp.dtype) -> Weight:
        params = {"embed": {"tokens": normal(key, dtype, IN, OUT)}, "layers": {"w": jnp.zeros((2, 4, 4), dtype)}}
        params |= {} if tied else {"head": jnp.zeros((OUT, IN), dtype)}
        return peft.method_of(config).adapt(params, EMBEDDING, key, config)["embed"]["tokens"]

    def build(key: jax.Array, dtype: jnp.dtype) -> Weight:
        layers = [one(k, dtype) for k in jax.random.split(key, LAYERS)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    return build
