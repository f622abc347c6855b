"""Completions with a label each, desirable or not: what KTO and BCO have in common."""

import jax
import jax.numpy as jnp

from jaxft.objectives import sequences, terms
from jaxft.objectives.terms import Batch, Means, Scores


def log_ratios(scores: Scores, batch: Batch) -> jax.Array:
    """log π - log π_ref of each completion, float32[B, S]; nats."""
    return sequences.sums(scores["policy"]["logp"] - scores["reference"]["logp"], batch)


def margin_shares(batch: Batch) -> jax.Array:
    """What each completion counts in the mean reward of the desirable less that of the others, float32[rows, S]: one
    over the number of those with its label in the batch, with a sign. Zeros where there are none of one kind."""
    liked, disliked = (batch["sequence_mask"] & (batch["label"] == label) for label in (True, False))
    likes, dislikes = (jnp.sum(mask, dtype=jnp.float32) for mask in (liked, disliked))
    shares = terms.divide(liked.astype(jnp.float32), likes) - terms.divide(disliked.astype(jnp.float32), dislikes)
    return jnp.where((likes > 0) & (dislikes > 0), shares, jnp.zeros_like(shares))


def metrics(rewards: jax.Array, logps: jax.Array, scores: Scores, batch: Batch) -> Means:
    """``rewards/chosen``, ``rewards/rejected``, ``logps/chosen`` and ``logps/rejected``, means over the completions of
    that label; ``rewards/margins``, the difference of the first two, from the batch's ``margin_share`` [B, S]; and
    `sequences.token_metrics`. rewards, logps: float32[B, S]."""
    found = {}
    for name, label in (("chosen", True), ("rejected", False)):
        keep = batch["sequence_mask"] & (batch["label"] == label)
        found |= {f"rewards/{name}": terms.masked(rewards, keep), f"logps/{name}": terms.masked(logps, keep)}
    share = batch["margin_share"]
    found["rewards/margins"] = terms.Mean(jnp.sum(share * rewards), jnp.sum(jnp.abs(share)) / 2)
    liked = batch["loss_mask"] & sequences.of_token(batch["label"], batch)
    return sequences.detached(found) | sequences.token_metrics(scores, batch, liked)
