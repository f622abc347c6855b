r"""REINFORCE: the policy gradient itself, with one of several baselines, and REINFORCE++.

.. math:: A_t = \sum_{s \ge t} \gamma^{s - t} \left( [s \text{ is last}] (r - b) - \beta\, \mathrm{kl}_s \right),
          \qquad L = -\overline{A_t \log \pi_t}

Williams 1992. The baseline b is the running mean of the rewards, the mean of the prompt's others, or none. REINFORCE++
(Hu et al. 2025, arXiv:2501.03262): ``baseline=none whiten=true epsilon=0.2`` and a ``beta`` in the reward, such as
0.01; its variant for several samples a prompt (REINFORCE++-baseline): ``baseline=group whiten=true epsilon=0.2`` and a
``beta`` with ``kl_in=loss kl_estimator=k2``.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import advantages, ratios, rollouts, sequences, surrogates, terms
from jaxft.objectives.ratios import Estimator
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores


@dataclass(frozen=True)
class Reinforce:
    """REINFORCE with a baseline, and REINFORCE++, on completions that the policy writes and reward functions judge."""

    baseline: Literal["running", "group", "leave_one_out", "none"] = "running"
    """What a reward is compared with: a running mean of all, the mean of those of its prompt, of the others of its
    prompt, or nothing."""
    baseline_decay: float = 0.9
    """Of the running mean: what is kept of it from rollout to rollout. The first has its own mean."""
    whiten: bool = False
    """Whether advantages have zero mean and unit variance over all tokens of a rollout."""
    gamma: float = 1.0
    """What a reward counts at the token before, and so on."""
    beta: float = 0.0
    """Weight of the divergence from the reference. 0: there is none, and no model stands for it."""
    kl_estimator: Estimator = "k1"
    """What estimates the divergence: k1, k2 or k3."""
    kl_in: Literal["loss", "reward"] = "reward"
    """Whether it is a part of the loss of each token, or taken from the reward of each token."""
    epsilon: float | None = None
    """How far a token's probability ratio may go from 1 before it has no gradient. Default: there is no ratio, and
    every step is taken as if the policy had just written the completions."""
    average: Literal["tokens", "sequences"] = "tokens"
    """Whether the loss is a mean over tokens, or over completions of sums over their tokens."""
    mask_truncated_completions: bool = False
    """Whether completions that the limit cut off count nowhere."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"objective.gamma: got {self.gamma}; expected from 0 to 1")
        if not 0 <= self.baseline_decay < 1:
            raise ValueError(f"objective.baseline_decay: got {self.baseline_decay}; expected from 0 to below 1")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"objective.beta: got {self.beta}; expected a finite number, 0 or more")
        if self.epsilon is not None and not self.epsilon > 0:
            raise ValueError(f"objective.epsilon: got {self.epsilon}; expected a number above 0")
        if self.kl_in == "loss" and self.beta and self.kl_estimator == "k1":
            raise ValueError(
                "objective.kl_estimator: got k1 in the loss, whose gradient is 0 on average; take k2 or k3"
            )


def rollout_needs(config: Reinforce) -> tuple[str, ...]:
    """What is scored once a rollout."""
    return ("old_logp", "ref_logp") if config.beta else ("old_logp",)


def compares(config: Reinforce) -> bool:
    """Whether the baseline is that of other completions of the prompt."""
    return config.baseline in ("group", "leave_one_out")


def begin(config: Reinforce) -> Carry:
    """No rewards yet: their running sum ``reward``, and what its parts ``weigh``."""
    zero = jnp.float32(0)
    return {"reward": zero, "weight": zero} if config.baseline == "running" else {}


def estimate(config: Reinforce, rollout: Batch, running: Carry) -> tuple[dict[str, jax.Array], Means, Carry]:
    """Adds ``advantage`` float32[N, T]; with ``mask_truncated_completions`` changes ``loss_mask``.

    Metrics: `rollouts.metrics`, ``kl`` where it is in the reward (nats a token), ``baseline`` where it runs,
    ``frac_reward_zero_std`` and `ratios.sampling_metrics`."""
    metrics = rollouts.metrics(rollout)
    rollout = rollouts.counted(rollout, config.mask_truncated_completions)
    reward, group = rollouts.combined(rollout["reward"], rollout["reward_weight"]), rollout["group"]
    gain = reward
    if config.baseline == "running":
        baseline, running = _running(config, reward, running)
        gain, metrics["baseline"] = reward - baseline, rollouts.single(baseline)
    elif config.baseline == "group":
        gain = reward - advantages.group_mean(reward, group)
    elif config.baseline == "leave_one_out":
        gain = advantages.leave_one_out(reward, group)
    keep = rollout["loss_mask"] & ~jnp.isnan(gain)[:, None]
    each = advantages.at_last(gain, keep)
    if config.beta and config.kl_in == "reward":
        kl, metrics["kl"] = ratios.of_rollout(config.kl_estimator, rollout)
        each = each - config.beta * kl
    advantage = advantages.discounted(each, keep, config.gamma)
    if config.whiten:
        advantage = advantages.whitened(advantage, keep)
    metrics["frac_reward_zero_std"] = advantages.without(advantages.group_deviation(reward, group))
    if "old_logp" in rollout:
        metrics |= ratios.sampling_metrics(rollout)
    return rollouts.added(advantage, rollout, config.mask_truncated_completions), metrics, running


def _running(config: Reinforce, reward: jax.Array, running: Carry) -> tuple[jax.Array, Carry]:
    """The mean of the rollouts before this, or where there is none of this one, and the next running quantities."""
    now = rollouts.mean(reward)
    known = ~jnp.isnan(now)
    before = terms.divide(running["reward"], running["weight"])
    baseline = jnp.where(running["weight"] > 0, before, rollouts.known(now))
    share = jnp.where(known, 1.0 - config.baseline_decay, 0.0)
    after = {"reward": rollouts.known(now), "weight": jnp.float32(1)}
    return baseline, {name: (1.0 - share) * running[name] + share * after[name] for name in after}


def reinforce(config: Reinforce, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over completions; nats.

    Args:
      scores: ``policy`` with ``logp`` float32[B, T]; if there, ``entropy``.
      batch: see `ratios`; with ``kl_in=loss`` with ``ref_logp``.

    Returns the terms ``policy`` and ``kl`` (times beta), and the metrics ``kl``, ``entropy`` and, with an ``epsilon``,
    `ratios.clip_metrics`."""
    del carry
    tokens, metrics = ratios.tokens(scores, batch), sequences.token_metrics(scores, batch, batch["loss_mask"])
    if config.epsilon is None:
        loss = -tokens.advantage * tokens.logp
    else:
        ratio, low, high = jnp.exp(tokens.logp - tokens.old), 1.0 - config.epsilon, 1.0 + config.epsilon
        loss = surrogates.clipped(ratio, tokens.advantage, low, high)
        below, above = (ratio < low) & (tokens.advantage < 0), (ratio > high) & (tokens.advantage > 0)
        metrics |= ratios.clip_metrics(below, above, "token", batch)
    losses = {"policy": _averaged(config, loss, batch)}
    if config.beta and config.kl_in == "loss":
        kl = ratios.divergence(config.kl_estimator, tokens.logp, ratios.reference(tokens.logp, batch))
        mean = _averaged(config, kl, batch)
        losses["kl"] = Mean(config.beta * mean.total, mean.weight)
        metrics["kl"] = terms.masked(kl, batch["loss_mask"])
    return losses, sequences.detached(metrics)


def _averaged(config: Reinforce, loss: jax.Array, batch: Batch) -> Mean:
    if config.average == "tokens":
        return terms.masked(loss, batch["loss_mask"])
    return terms.masked(sequences.sums(loss, batch), batch["sequence_mask"])
