r"""RLOO: completions compared with the others of the same prompt, each as one action.

.. math:: A_i = R_i - \frac{1}{G - 1} \sum_{j \ne i} R_j, \qquad
          R_i = r_i - \beta \sum_t \log \frac{\pi_\text{old}}{\pi_\text{ref}}, \qquad
          L = -\frac{1}{N} \sum_i \min(\rho_i A_i, \mathrm{clip}(\rho_i, 1 - \epsilon, 1 + \epsilon_h) A_i)

Ahmadian et al. 2024, eq. 7 (arXiv:2402.14740). The ratio is that of the whole completion.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.objectives import advantages, ratios, rollouts, sequences, surrogates, terms
from jaxft.objectives.terms import Batch, Carry, Means, Scores


@dataclass(frozen=True)
class RLOO:
    """REINFORCE leave-one-out, on completions that the policy writes and reward functions judge."""

    beta: float = 0.05
    """Weight of the divergence from the reference, taken from the reward. 0: there is none, and no model stands for
    it."""
    epsilon: float = 0.2
    """How far the ratio of a completion may fall below 1 before it has no gradient."""
    epsilon_high: float | None = None
    """How far above 1. Default: as ``epsilon``."""
    normalize_advantages: bool = False
    """Whether advantages have zero mean and unit variance over a rollout."""
    reward_clip_range: tuple[float, float] | None = None
    """Least and greatest reward, before the divergence is taken from it. Default: none."""
    mask_truncated_completions: bool = False
    """Whether completions that the limit cut off have no tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"objective.beta: got {self.beta}; expected a finite number, 0 or more")
        for name in ("epsilon", "epsilon_high"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"objective.{name}: got {value}; expected a number above 0")
        if self.reward_clip_range is not None and not self.reward_clip_range[0] < self.reward_clip_range[1]:
            raise ValueError(f"objective.reward_clip_range: got {list(self.reward_clip_range)}; expected [least, most]")


def rollout_needs(config: RLOO) -> tuple[str, ...]:
    """What is scored once a rollout."""
    return ("old_logp", "ref_logp") if config.beta else ("old_logp",)


def estimate(config: RLOO, rollout: Batch, running: Carry) -> tuple[dict[str, jax.Array], Means, Carry]:
    """Adds ``advantage`` float32[N, T]; with ``mask_truncated_completions`` changes ``loss_mask``.

    Metrics: `rollouts.metrics`, ``kl`` (nats a token), ``frac_reward_zero_std`` and `ratios.sampling_metrics`."""
    metrics = rollouts.metrics(rollout)
    rollout = rollouts.counted(rollout, config.mask_truncated_completions)
    reward = rollouts.combined(rollout["reward"], rollout["reward_weight"])
    if config.reward_clip_range is not None:
        reward = jnp.clip(reward, *config.reward_clip_range)
    if config.beta:
        kl, metrics["kl"] = ratios.of_rollout("k1", rollout)
        reward = reward - config.beta * jnp.sum(kl, axis=1)
    advantage = advantages.leave_one_out(reward, rollout["group"])
    if config.normalize_advantages:
        deviation = rollouts.deviation(advantage) + advantages.EPSILON
        advantage = (advantage - rollouts.mean(advantage)) / deviation
    metrics["frac_reward_zero_std"] = advantages.without(advantages.group_deviation(reward, rollout["group"]))
    if "old_logp" in rollout:
        metrics |= ratios.sampling_metrics(rollout)
    return rollouts.added(advantage, rollout, config.mask_truncated_completions), metrics, running


def rloo(config: RLOO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sum over completions; nats.

    Args:
      scores: ``policy`` with ``logp`` float32[B, T]; if there, ``entropy``.
      batch: see `ratios`.

    Returns the term ``policy``, and the metrics ``entropy`` and `ratios.clip_metrics`, of completions."""
    del carry
    tokens = ratios.tokens(scores, batch)
    ratio = jnp.exp(sequences.sums(tokens.logp - tokens.old, batch))
    low, high = 1.0 - config.epsilon, 1.0 + (config.epsilon_high or config.epsilon)
    loss = surrogates.clipped(ratio, sequences.means(tokens.advantage, batch), low, high)
    ratio = sequences.of_token(ratio, batch)
    below, above = (ratio < low) & (tokens.advantage < 0), (ratio > high) & (tokens.advantage > 0)
    metrics = ratios.clip_metrics(below, above, "sequence", batch)
    metrics |= sequences.token_metrics(scores, batch, batch["loss_mask"])
    return {"policy": terms.masked(loss, batch["sequence_mask"])}, sequences.detached(metrics)
