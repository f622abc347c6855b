r"""Old and new policy: the ratios of their probabilities, how far both are apart, and from a reference.

A batch holds sequences as `sequences` has them, and per token float32[B, T] ``advantage``, ``old_logp`` (what the
trainer said of the policy that wrote them; without it the policy has not changed since), ``sampler_logp`` (what the
sampler drew from) and ``ref_logp``.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.objectives import rollouts, sequences, terms
from jaxft.objectives.terms import Batch, Mean, Means, Scores

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

LOG_LEAST, LOG_MOST = -18.420680743952367, 20.0
"""Bounds of the log-ratio of a sequence: log 1e-8 and 20."""


class Tokens(NamedTuple):
    """float32[B, T] each; 0 where there is no token of a completion, whatever stood there."""

    logp: jax.Array
    """Has the gradient."""
    old: jax.Array
    advantage: jax.Array


def tokens(scores: Scores, batch: Batch) -> Tokens:
    """Those of the batch's completions."""
    keep, logp = batch["loss_mask"], scores["policy"]["logp"]
    old = batch["old_logp"] if "old_logp" in batch else jax.lax.stop_gradient(logp)
    return Tokens(*(jnp.where(keep, x, 0.0) for x in (logp, old, batch["advantage"])))


def divergence(kind: Estimator, logp: jax.Array, ref: jax.Array) -> jax.Array:
    """Estimates of KL(π, π_ref) by tokens drawn from π, of any shape; nats. k1 is unbiased, k2 half its square, k3
    unbiased and never negative: Schulman 2020 (joschu.net/blog/kl-approx.html)."""
    log_ratio = ref - logp
    if kind == "k1":
        return -log_ratio
    return jnp.square(log_ratio) / 2 if kind == "k2" else jnp.exp(log_ratio) - log_ratio - 1.0


def reference(logp: jax.Array, batch: Batch) -> jax.Array:
    """``ref_logp`` where there are completions, and ``logp`` elsewhere, from which it then does not differ."""
    return jnp.where(batch["loss_mask"], batch["ref_logp"], jax.lax.stop_gradient(logp))


def log_weights(log_ratio: jax.Array, level: Level, batch: Batch) -> jax.Array:
    """Of each token its own log-ratio, or the mean of its sequence: Zheng et al. 2025, eq. 7 (arXiv:2507.18071)."""
    return log_ratio if level == "token" else sequences.of_token(sequences.means(log_ratio, batch), batch)


def sampler_ratio(mode: Correction, least: float | None, most: float | None, old: jax.Array, batch: Batch) -> jax.Array:
    """How much likelier the trainer finds what the sampler drew, each token or the product over its sequence, within
    bounds: float32[B, T]. Beyond the bounds it is the bound (``truncate``) or 0 (``mask``).

    Corrects for a sampler whose numbers differ: Yao et al. 2025 (fengyao.notion.site/off-policy-rl). Where the
    sampler's log-probability is NaN the two count as equal. ``old``: float32[B, T]."""
    log_ratio = rollouts.known(jnp.where(batch["loss_mask"], old - batch["sampler_logp"], 0.0))
    if level(mode) == "sequence":
        log_ratio = sequences.of_token(sequences.sums(log_ratio, batch), batch)
    ratio = jnp.exp(log_ratio)
    least, most = (-jnp.inf if least is None else least), (jnp.inf if most is None else most)
    if mode.endswith("truncate"):
        return jnp.clip(ratio, least, most)
    return jnp.where((ratio < least) | (ratio > most), 0.0, ratio)


def level(mode: Correction) -> Level:
    """Of what a correction is a ratio."""
    return "token" if mode.startswith("token") else "sequence"


def near(tokens: Tokens, threshold: float, batch: Batch) -> jax.Array:
    """bool[B, T]: the token is no worse than usual, or the policy is still within ``threshold`` nats a token, in the
    mean over the sequence, of what sampled it: DeepSeek-AI 2025, eq. 9 (arXiv:2512.02556)."""
    drawn = batch["sampler_logp"] if "sampler_logp" in batch else tokens.old
    apart = rollouts.known(jnp.where(batch["loss_mask"], drawn - jax.lax.stop_gradient(tokens.logp), 0.0))
    mean = sequences.of_token(sequences.means(apart, batch), batch)
    return (tokens.advantage >= 0) | (mean <= threshold)


def over(x: jax.Array, level: Level, batch: Batch) -> Mean:
    """The mean over tokens, or where all of a sequence's have the same, over sequences. x: float32[B, T]."""
    if level == "token":
        return terms.masked(x, batch["loss_mask"])
    return terms.masked(sequences.means(x, batch), batch["sequence_mask"])


def clip_metrics(low: jax.Array, high: jax.Array, level: Level, batch: Batch) -> Means:
    """``clip_ratio/low_mean``, ``high_mean`` and ``region_mean``: how much is clipped below, above, or at all; and
    ``low_min`` and ``high_max`` of a sequence's share (least and greatest: means over micro-batches).

    low, high: bool[B, T]."""
    shares = {name: x.astype(jnp.float32) for name, x in (("low", low), ("high", high), ("region", low | high))}
    found = {f"clip_ratio/{name}_mean": over(x, level, batch) for name, x in shares.items()}
    exists = batch["sequence_mask"] & (sequences.lengths(batch) > 0)
    some = jnp.any(exists).astype(jnp.float32)
    least, most = sequences.means(shares["low"], batch), sequences.means(shares["high"], batch)
    found["clip_ratio/low_min"] = Mean(some * jnp.min(jnp.where(exists, least, 1.0)), some)
    found["clip_ratio/high_max"] = Mean(some * jnp.max(jnp.where(exists, most, 0.0)), some)
    return found


def of_rollout(kind: Estimator, rollout: Batch) -> tuple[jax.Array, Mean]:
    """Estimates of the divergence of the policy that sampled from the reference, float32[N, T], 0 where there is no
    completion; and their mean over tokens."""
    keep = rollout["loss_mask"]
    old = jnp.where(keep, rollout["old_logp"], 0.0)
    kl = divergence(kind, old, reference(old, rollout))
    return kl, terms.masked(kl, keep)


def sampling_metrics(rollout: Batch, ratio: jax.Array | None = None, of: Level = "token") -> Means:
    """Of the whole rollout: ``sampling/sampling_logp_difference/mean`` and ``max``, between trainer and sampler (nats a
    token), and ``sampling/importance_sampling_ratio/min``, ``mean`` and ``max`` of `sampler_ratio` float32[N, T], if
    there is one."""
    keep = rollout["loss_mask"]
    apart = jnp.abs(jnp.where(keep, rollout["old_logp"] - rollout["sampler_logp"], jnp.nan))
    found = {"sampling/sampling_logp_difference/mean": rollouts.mean(apart)}
    found["sampling/sampling_logp_difference/max"] = jnp.max(rollouts.known(apart))
    if ratio is not None:
        each = jnp.where(keep, ratio, jnp.nan)
        if of == "sequence":
            each = jnp.where(rollout["sequence_mask"], sequences.means(ratio, rollout), jnp.nan)
        none = jnp.all(jnp.isnan(each))
        least, most = (jnp.where(jnp.isnan(each), bound, each) for bound in (jnp.inf, -jnp.inf))
        name = "sampling/importance_sampling_ratio"
        found[f"{name}/min"] = jnp.where(none, 0.0, jnp.min(least))
        found[f"{name}/mean"] = rollouts.mean(each)
        found[f"{name}/max"] = jnp.where(none, 0.0, jnp.max(most))
    return {name: rollouts.single(rollouts.known(x)) for name, x in found.items()}
