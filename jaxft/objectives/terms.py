"""What an objective is and what it returns: sums and the weights that divide them, never a quotient.

Unusual: no objective divides. It returns `Mean(total, weight)` for each term of the loss and each metric; the step adds
the weights of the whole batch first and divides once, so micro-batching, packing and data-parallel width never change
the loss, with any mix of terms.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

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
CRITIC = "critic"
"""Where a policy's parameters hold those of the value model."""


def actor(params: Any) -> Any:
    """A policy's parameters without those of the value model."""
    known = isinstance(params, dict) and CRITIC in params
    return {name: part for name, part in params.items() if name != CRITIC} if known else params


Named = tuple[str, ...] | Callable[[Any], tuple[str, ...]]
"""Names, or a function from an objective's settings to names."""


def _nothing(config: Any) -> Carry:
    return {}


def _always(config: Any) -> bool:
    return True


def _never(config: Any) -> bool:
    return False


def _still(config: Any) -> "Follow | None":
    return None


class Follow(NamedTuple):
    """A reference that moves: every ``steps`` steps it becomes ``mixup`` times the policy plus the rest of itself."""

    mixup: float
    steps: int


@dataclass(frozen=True)
class Objective(Generic[C]):
    """One row of `OBJECTIVES`: a pure function on arrays and what it asks of the models and of the data."""

    config: type[C]
    fn: Callable[[C, Scores, Batch, Carry], tuple[Means, Means]]
    """``fn(config, scores, batch, carry) -> (loss terms, metrics)``. A term's weight depends on ``batch`` alone."""
    needs: Named = ("logp",)
    """Names of the per-token scores that must be there."""
    reports: Named = ()
    """Names of scores turned into metrics where they are there."""
    views: Named = ("policy",)
    """Parameter sets that are scored, in this order; ``reference`` is the trainable tree as the stage began, ``start``
    the same where the policy is to see all that it says, as it does of a ``teacher``; ``value`` is the tree under
    ``critic`` in the policy's parameters, which trains as the policy does."""
    rows: Literal["tokens", "pairs", "labelled", "steps", "rollout"] = "tokens"
    """What a row of the batch holds: running text, pairs of a chosen and a rejected sequence, sequences with a label
    each, sequences whose steps have one, or sequences that the policy wrote."""
    asides: Named = ()
    """Prefixes of batch arrays (``kl``: ``kl_tokens``, ...) that every view scores without a gradient, for
    ``annotate``: ``scores["policy/kl"]``."""
    annotate: Callable[[C, Scores, Batch, Carry], tuple[dict[str, jax.Array], Carry]] | None = None
    """What couples the rows of a batch, or runs from step to step: ``(config, scores, batch, carry) -> (arrays [rows,
    ...] to add to the batch, the next carry)``. It sees the whole batch of a step, all micro-batches, and scores
    without a gradient; ``fn`` then sees what it returned."""
    couples: Callable[[C], bool] = _always
    """Whether ``annotate`` is asked with these settings: before a step in parts it costs a pass over the batch."""
    carry: Callable[[C], Carry] = _nothing
    """The running quantities before the first step: float32 scalars."""
    examine: Callable[[C, Scores, Batch, Carry], Means] | None = None
    """What an evaluation asks for besides: sums, arrays of them too, as ``fn`` returns its metrics."""
    follow: Callable[[C], Follow | None] = _still
    """How the reference moves; None: it does not."""
    rollout_needs: Named = ()
    """Of a rollout, what is scored before ``estimate``: of ``old_logp``, ``ref_logp`` and ``value``."""
    estimate: Callable[[C, Batch, Carry], tuple[dict[str, jax.Array], Means, Carry]] | None = None
    """What the rewards of a rollout say of its tokens: ``(config, rollout, running) -> (arrays to add to it, metrics,
    the next running quantities)``. It sees the whole rollout (`rollouts`) before its first step; ``advantage`` [N, T]
    is always among the arrays."""
    compares: Callable[[C], bool] = _never
    """Whether ``estimate`` compares completions of one prompt, and so finds nothing in a single one."""
    running: Callable[[C], Carry] = _nothing
    """What ``estimate`` remembers from rollout to rollout, before the first: float32 scalars."""

    def annotation(self, config: C) -> Callable[[Scores, Batch, Carry], tuple[dict[str, jax.Array], Carry]] | None:
        """``annotate`` with these settings; None where nothing couples the rows."""
        if self.annotate is None or not self.couples(config):
            return None
        return functools.partial(self.annotate, config)

    def asked(self, config: C) -> "Asked":
        """What it asks for with these settings."""
        found = (self.needs, self.reports, self.views, self.asides, self.rollout_needs)
        return Asked(*(names(config) if callable(names) else names for names in found))


class Asked(NamedTuple):
    """See `Objective`."""

    needs: tuple[str, ...]
    reports: tuple[str, ...]
    views: tuple[str, ...]
    asides: tuple[str, ...]
    rollout_needs: tuple[str, ...]


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


def by_sequence(x: jax.Array, keep: jax.Array, segments: jax.Array, count: int) -> jax.Array:
    """Sum over each of a row's sequences: float32[B, count].

    Args:
      x: float32[B, T].
      keep: bool[B, T]; what stands where it is False, NaN included, has no effect and no gradient.
      segments: int32[B, T], the sequence of each token, from 1; 0 is padding.
    """
    x = jnp.where(keep, x, jnp.zeros((), x.dtype)).astype(jnp.float32)
    return jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=count + 1))(x, segments)[:, 1:]


def counterparts(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """For each target token the teacher's token of the same number among the targets of the same sequence.

    ``batch``: loss_mask bool[B, T] and the teacher's own teacher_loss_mask bool[B, W], maybe with segments and
    teacher_segments (without: a row is one sequence). Returns the places int32[B, T] in the teacher's rows, and
    bool[B, T], True where there is such a token: the longer of two completions ends with targets that have none."""

    def numbered(prefix: str) -> tuple[jax.Array, jax.Array]:
        mask = batch[f"{prefix}loss_mask"]
        segments = batch[f"{prefix}segments"] if f"{prefix}segments" in batch else jnp.ones(mask.shape, jnp.int32)
        before = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask.astype(jnp.int32)
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        number = before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
        return mask, segments * jnp.int32(longest) + number

    longest = max(batch["loss_mask"].shape[1], batch["teacher_loss_mask"].shape[1])
    (mask, wanted), (there, held) = numbered(""), numbered("teacher_")
    held = jnp.where(there, held, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(held, axis=1)
    held = jnp.take_along_axis(held, order, axis=1)
    at = jnp.minimum(jax.vmap(jnp.searchsorted)(held, wanted), held.shape[1] - 1)
    found = mask & (jnp.take_along_axis(held, at, axis=1) == wanted)
    return jnp.take_along_axis(order, at, axis=1), found


def add(a: Means, b: Means) -> Means:
    """Sums of two sets with the same names: the means over both."""
    return {name: Mean(a[name].total + b[name].total, a[name].weight + b[name].weight) for name in a}


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """``total / weight``, and 0 where the weight is 0 (with a finite gradient)."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, jnp.ones_like(weight)), jnp.zeros_like(total))


def values(means: Means) -> dict[str, jax.Array]:
    """The means themselves. Only the step and the evaluation take them."""
    return {name: divide(mean.total, mean.weight) for name, mean in means.items()}
