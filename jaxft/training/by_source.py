"""What an objective says of each source of a mixture: the same sums, over the rows of that source alone.

Nothing is scored again: the objective is asked once more for each source, with the others' rows masked out of the
batch. A term ``t`` is reported as ``source/<name>/loss`` (of several: ``source/<name>/loss/t``), and a source's share
of the batch's tokens as ``source/<name>/share``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.objectives.terms import Batch, Carry, Mean, Means, Objective, Scores

PREFIX = "source/"
KEPT = ("nll", "mean_token_accuracy", "rewards/accuracies", "accuracy")
"""The metrics of an objective that are told of each source."""


def by_source(objective: Objective, names: Sequence[str]) -> Objective:
    """The objective with metrics of each source, whose number ``batch["source"]`` int32[B] tells; without names, as it
    is."""
    if not names:
        return objective

    def fn(config: Any, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
        losses, metrics = objective.fn(config, scores, batch, carry)
        fixed, apart = jax.lax.stop_gradient(dict(scores)), {}
        for number, name in enumerate(names):
            own_B = batch["source"] == number
            terms, found = objective.fn(config, fixed, _masked(batch, own_B), carry)
            apart |= {f"loss/{t}" if len(terms) > 1 else "loss": mean for t, mean in terms.items()} | {
                metric: found[metric] for metric in KEPT if metric in found
            }
            tokens_B = row_tokens(batch).astype(jnp.float32)
            apart["share"] = Mean(jnp.sum(jnp.where(own_B, tokens_B, 0.0)), jnp.sum(tokens_B))
            metrics = metrics | {f"{PREFIX}{name}/{metric}": mean for metric, mean in apart.items()}
        return losses, metrics

    return dataclasses.replace(objective, fn=fn)


def _masked(batch: Batch, own_B: jax.Array) -> Batch:
    """The batch in which the other rows have nothing to learn or to judge."""

    def mask(a: jax.Array) -> jax.Array:
        return a & own_B.reshape(-1, *[1] * (a.ndim - 1))

    return {name: mask(a) if name.endswith("mask") and a.dtype == bool else a for name, a in batch.items()}


def row_tokens(batch: Batch) -> jax.Array:
    """Tokens of each row that are not padding: int32[...], without the last axis of ``tokens``.

    Without segments a row is one document, whose last position tells its length."""
    if "segments" in batch:
        return jnp.sum(batch["segments"] > 0, axis=-1, dtype=jnp.int32)
    if "positions" in batch:
        last = jnp.max(batch["positions"], axis=-1)
        return jnp.where(last > 0, last + 1, 0).astype(jnp.int32)
    return jnp.full(batch["tokens"].shape[:-1], batch["tokens"].shape[-1], jnp.int32)


def counted(values: Mapping[str, float], tokens: int, counts: dict[str, int]) -> dict[str, float]:
    """The numbers of a step, with ``source/<name>/num_tokens`` so far in the place of its share; what is said of a
    source that is not in the step is left out. ``counts``: tokens of each source so far, which are added to."""
    values = dict(values)
    for name in [n.removeprefix(PREFIX).removesuffix("/share") for n in values if is_share(n)]:
        counts[name] = counts.get(name, 0) + round(values[f"{PREFIX}{name}/share"] * tokens)
    seen = present(values)
    return {n: v for n, v in seen.items() if not is_share(n)} | {
        f"{PREFIX}{name}/num_tokens": float(count) for name, count in counts.items()
    }


def present(values: Mapping[str, float]) -> dict[str, float]:
    """The numbers without those of sources that have no token here."""
    absent = tuple(name.removesuffix("share") for name, value in values.items() if is_share(name) and not value)
    return {name: value for name, value in values.items() if not (absent and name.startswith(absent))}


def is_share(name: str) -> bool:
    """Whether a metric is the share that a source has of the tokens."""
    return name.startswith(PREFIX) and name.endswith("/share")
