"""Rows in which the prompt of two sequences stands once: everything but attention is computed once for it.

Attention is told apart by sequence: its inputs are laid out with the prompt before each completion, so that any kernel,
window or cap sees ordinary packed sequences, and its outputs are laid back. Both ways are gathers, and so are both
gradients: a token has at most two places, so none of them needs a scatter.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Unfold(NamedTuple):
    """Where tokens [B, T] stand in whole sequences [B, W], laid end to end."""

    index: jax.Array
    """int32[B, W]: the token in each place."""
    segments: jax.Array
    """int32[B, W]: its sequence, 0 where there is none."""
    fold: jax.Array
    """int32[B, T]: the place of each token."""
    again: jax.Array
    """int32[B, T]: the place of its second copy, -1 where it has none."""


def of(batch: Mapping[str, jax.Array]) -> Unfold | None:
    """What a batch says of it; None where every sequence has its own prompt."""
    if "unfold" not in batch:
        return None
    return Unfold(batch["unfold"], batch["unfold_segments"], batch["fold"], batch["fold_again"])


@jax.custom_vjp
def whole(x: jax.Array, how: Unfold) -> jax.Array:
    """[B, T, ...] -> [B, W, ...]; what stands where there is no token means nothing."""
    return _taken(x, how.index)


def _whole_forward(x: jax.Array, how: Unfold):
    return whole(x, how), how


def _whole_backward(how: Unfold, g: jax.Array):
    there = _taken(how.index, how.fold) == jnp.arange(how.fold.shape[1])  # padding has no place
    first, second = _taken(g, how.fold), _taken(g, jnp.maximum(how.again, 0))
    return jnp.where(_wide(there, g), first, 0) + jnp.where(_wide(how.again >= 0, g), second, 0), None


@jax.custom_vjp
def back(x: jax.Array, how: Unfold) -> jax.Array:
    """[B, W, ...] -> [B, T, ...], of two copies the first."""
    return _taken(x, how.fold)


def _back_forward(x: jax.Array, how: Unfold):
    return back(x, how), how


def _back_backward(how: Unfold, g: jax.Array):
    own = _taken(how.fold, how.index) == jnp.arange(how.index.shape[1])
    return jnp.where(_wide(own & (how.segments > 0), g), _taken(g, how.index), 0), None


whole.defvjp(_whole_forward, _whole_backward)
back.defvjp(_back_forward, _back_backward)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _wide(keep: jax.Array, like: jax.Array) -> jax.Array:
    return keep.reshape(*keep.shape, *[1] * (like.ndim - 2))
