"""Completions of a batch: sums of their tokens' scores, as pairs or with a label each, and the metrics of both.

A row holds S sequences at most, a prompt and a completion each; ``segments`` numbers them from 1 and ``loss_mask`` is
True on the completions. Sequences 2p and 2p + 1 of a row are the chosen and the rejected of its pair p. What stands in
padding, and in sequences that do not exist, has no effect and no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.objectives import terms
from jaxft.objectives.terms import Batch, Mean, Means, Scores


class Pair(NamedTuple):
    """Something of the chosen and of the rejected of each pair."""

    chosen: jax.Array
    rejected: jax.Array


def pairs(x: jax.Array) -> Pair:
    """Splits [B, S, ...] into two of [B, S/2, ...]: chosen and rejected."""
    if x.shape[1] % 2:
        raise ValueError(f"sequences of pairs: rows hold {x.shape[1]}; expected an even number, chosen before rejected")
    return Pair(x[:, ::2], x[:, 1::2])


def sums(x: jax.Array, batch: Batch) -> jax.Array:
    """Sums of ``x`` float32[B, T] over the tokens of each completion: float32[B, S]; 0 where there is none."""
    total = terms.by_sequence(x, batch["loss_mask"], batch["segments"], batch["sequence_mask"].shape[1])
    return jnp.where(batch["sequence_mask"], total, jnp.zeros_like(total))


def lengths(batch: Batch) -> jax.Array:
    """Tokens of each completion: float32[B, S]."""
    return sums(jnp.ones(batch["loss_mask"].shape, jnp.float32), batch)


def means(x: jax.Array, batch: Batch) -> jax.Array:
    """Means of ``x`` float32[B, T] over the tokens of each completion: float32[B, S]; 0 where there is none."""
    return sums(x, batch) / jnp.maximum(lengths(batch), 1.0)


def at_end(x: jax.Array, batch: Batch) -> jax.Array:
    """``x`` float32[B, T] at the last token of each sequence: float32[B, S]; 0 where there is none."""
    segments, exists = batch["segments"], batch["sequence_mask"]
    last = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    found = terms.by_sequence(x, last & (segments > 0), segments, exists.shape[1])
    return jnp.where(exists, found, jnp.zeros_like(found))


def of_token(x: jax.Array, batch: Batch) -> jax.Array:
    """What each token's sequence has in ``x`` [B, S]: [B, T]. Padding has what the first sequence has."""
    return jnp.take_along_axis(x, jnp.maximum(batch["segments"] - 1, 0), axis=1)


def chosen_tokens(batch: Batch) -> jax.Array:
    """bool[B, T]: the token is of a chosen completion."""
    return batch["loss_mask"] & (batch["segments"] % 2 == 1)


def pair_mask(batch: Batch) -> jax.Array:
    """bool[B, S/2]: the pair exists."""
    mask = pairs(batch["sequence_mask"])
    return mask.chosen & mask.rejected


def detached(values: Means) -> Means:
    """Metrics, through which no gradient flows."""
    return {name: Mean(jax.lax.stop_gradient(mean.total), mean.weight) for name, mean in values.items()}


def token_metrics(scores: Scores, batch: Batch, answers: jax.Array) -> Means:
    """``entropy`` over all completions' tokens (nats) and ``mean_token_accuracy`` over ``answers`` bool[B, T], where
    the policy was asked for them."""
    policy, metrics = scores["policy"], {}
    if "entropy" in policy:
        metrics["entropy"] = terms.masked(policy["entropy"], batch["loss_mask"])
    if "correct" in policy:
        metrics["mean_token_accuracy"] = terms.masked(policy["correct"].astype(jnp.float32), answers)
    return detached(metrics)


def pair_metrics(rewards: Pair, logps: Pair, scores: Scores, batch: Batch) -> Means:
    """Means over pairs of ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies`` (the
    chosen's is higher), ``logps/chosen`` and ``logps/rejected``, and `token_metrics`. All float32[B, S/2]."""
    keep = pair_mask(batch)
    means = {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/margins": rewards.chosen - rewards.rejected,
        "rewards/accuracies": (rewards.chosen > rewards.rejected).astype(jnp.float32),
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
    }
    metrics = {name: terms.masked(x, keep) for name, x in means.items()}
    return detached(metrics) | token_metrics(scores, batch, chosen_tokens(batch))
