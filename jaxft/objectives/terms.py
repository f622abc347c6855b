"""What an objective is and what it returns: sums and the weights that divide them, never a quotient.

Unusual: no objective divides. It returns `Mean(total, weight)` for each term of the loss and each metric; the step adds
the weights of the whole batch first and divides once, so micro-batching, packing and data-parallel width never change
the loss, with any mix of terms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

C = TypeVar("C")
Batch = Mapping[str, jax.Array]
Scores = Mapping[str, Mapping[str, jax.Array]]
"""What the models say about a batch: ``scores[view][need]``, for example ``scores["policy"]["logp"]``."""
Carry = Mapping[str, jax.Array]
"""Running quantities of an objective, kept in the training state; empty for most."""


class Mean(NamedTuple):
    """A mean not yet taken: two float32 scalars. Adding two of them field by field is the mean over both."""

    total: jax.Array
    weight: jax.Array


Means = dict[str, Mean]


@dataclass(frozen=True)
class Objective(Generic[C]):
    """One row of `OBJECTIVES`: a pure function on arrays and what it asks of the models."""

    config: type[C]
    fn: Callable[[C, Scores, Batch, Carry], tuple[Means, Means]]
    """``fn(config, scores, batch, carry) -> (loss terms, metrics)``. A term's weight depends on ``batch`` alone."""
    needs: tuple[str, ...] = ("logp",)
    """Names of the per-token scores that must be there."""
    reports: tuple[str, ...] = ()
    """Names of scores turned into metrics where they are there."""
    views: tuple[str, ...] = ("policy",)
    """Parameter sets that are scored; ``reference`` is the trainable tree as the stage began."""


def masked(x: jax.Array, keep: jax.Array) -> Mean:
    """Sum of ``x`` where ``keep`` is True, and their number.

    Args:
      x: float32[B, T] or float32[B].
      keep: bool, of the same shape. What stands where it is False, NaN included, has no effect and no gradient.
    """
    if x.shape != keep.shape:
        raise ValueError(f"masked sum: values have shape {x.shape}, the mask {keep.shape}; expected equal shapes")
    total = jnp.sum(jnp.where(keep, x, jnp.zeros((), x.dtype)), dtype=jnp.float32)
    return Mean(total, jnp.sum(keep, dtype=jnp.float32))


def add(a: Means, b: Means) -> Means:
    """Sums of two sets with the same names: the means over both."""
    return {name: Mean(a[name].total + b[name].total, a[name].weight + b[name].weight) for name in a}


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """``total / weight``, and 0 where the weight is 0 (with a finite gradient)."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, jnp.ones_like(weight)), jnp.zeros_like(total))


def values(means: Means) -> dict[str, jax.Array]:
    """The means themselves. Only the step and the evaluation take them."""
    return {name: divide(mean.total, mean.weight) for name, mean in means.items()}
