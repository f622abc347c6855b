"""The four verbs besides ``x @ w`` that a model may apply to a weight, for plain arrays and `Weight`s alike."""

from typing import Any

import jax

from jaxft.core.weight import Weight


def take(w: Any, ids: jax.Array) -> jax.Array:
    """Embedding look-up: w[vocab, features], ids int32[...] -> [..., features]."""
    return w.take(ids) if isinstance(w, Weight) else w[ids]


def unembed(w: Any, x: jax.Array) -> jax.Array:
    """The tied head ``x @ w.T``: w[vocab, features], x[..., features] -> [..., vocab]."""
    return w.unembed(x) if isinstance(w, Weight) else x @ w.T


def ragged_dot(x: jax.Array, w: Any, group_sizes: jax.Array) -> jax.Array:
    """Grouped product over experts: x[tokens, in], w[experts, in, out], group_sizes int32[experts] -> [tokens, out]."""
    return w.ragged_dot(x, group_sizes) if isinstance(w, Weight) else jax.lax.ragged_dot(x, w, group_sizes)


def dense(w: Any) -> jax.Array:
    """The matrix that a weight stands for, in the dtype it was made from."""
    return w.dense() if isinstance(w, Weight) else w
