r"""GRPO: the policy gradient of completions compared with others of the same prompt, near the policy that wrote them.

.. math:: A_i = \frac{r_i - \mathrm{mean}(r_1 \dots r_G)}{\mathrm{std}(r_1 \dots r_G) + 10^{-4}}, \qquad
          L = \frac{1}{\sum_i |o_i|} \sum_i \sum_t \left[ \ell(\rho_{it}, A_i) + \beta k_3(\pi, \pi_\text{ref}) \right]

Shao et al. 2024, eq. 3 (arXiv:2402.03300). ``loss`` says what :math:`\ell` is (`surrogates`) and over
what the mean is taken:

- dapo, bnpo, cispo, vespo: over all tokens of the step, Yu et al. 2025, eq. 8 (arXiv:2503.14476). Elsewhere bnpo is the
  mean over a micro-batch; here a step's sums are divided once, so that bnpo and dapo are the same.
- grpo, sapo, gmpo: over sequences, of the means over their tokens
- dr_grpo: the sum over tokens, by sequences times ``max_completion_length``, Liu et al. 2025 (arXiv:2503.20783)
- luspo: over sequences, of the sums over their tokens (arXiv:2602.05261)
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import advantages, ratios, rollouts, sequences, surrogates, terms
from jaxft.objectives.ratios import Correction, Estimator, Level, Tokens
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores

ENTROPY = "trained_entropy"
"""The entropy with a gradient."""


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation, on completions that the policy writes and reward functions judge."""

    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo", "gmpo"] = "dapo"
    """Loss of a token, and over what it is averaged: dapo and bnpo (here the same) over all tokens, grpo over those of
    a completion first, dr_grpo by ``max_completion_length``, luspo not by length at all; cispo, sapo, vespo and gmpo do
    not clip as the others do."""
    importance_sampling_level: Level = "token"
    """Whether each token has its probability ratio, or all of a sequence the mean of theirs (GSPO)."""
    epsilon: float | None = None
    """How far a ratio may fall below 1 before it has no gradient. Default: 0.2; of gmpo, in logs, 0.4."""
    epsilon_high: float | None = None
    """How far above 1. Default: as ``epsilon``; .28 is usual. Of cispo the greatest ratio itself, such as 5."""
    delta: float | None = None
    """Greatest ratio where the advantage is negative. Default: none."""
    beta: float = 0.0
    """Weight of the divergence from the reference. 0: there is none, and no model stands for it."""
    kl_estimator: Estimator = "k3"
    """What estimates the divergence: k1, k2 or k3."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Whether it is a part of the loss of each token, or taken from the reward of each completion."""
    use_bias_correction_kl: bool = True
    """Whether its estimate in the loss is multiplied by the ratio, which makes its gradient right. Not of gmpo."""
    baseline: Literal["group", "leave_one_out"] = "group"
    """What a reward is compared with: the mean of its group, or of the others in it."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """By whose standard deviation the difference is divided."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Of several rewards: add them, then compare; or normalise each in its group, add, and normalise that (GDPO)."""
    mask_truncated_completions: bool = False
    """Whether completions that the limit cut off count nowhere."""
    max_completion_length: int = 512
    """Tokens that dr_grpo divides by: those that a completion may have."""
    top_entropy_quantile: float = 1.0
    """Share of tokens, those where the policy was least sure, that have a gradient; .2 is usual."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy, which the loss then rewards."""
    use_adaptive_entropy: bool = False
    """Whether ``entropy_coef`` is where the weight begins, which then rises by ``entropy_coef_delta`` after each step
    whose entropy is at most ``entropy_target``, falls by it after others, and has no effect after those."""
    entropy_target: float = 0.2
    """Nats a token."""
    entropy_coef_delta: float = 0.005
    """Change of the weight a step."""
    entropy_coef_min: float = 0.0
    """Least weight."""
    entropy_coef_max: float = 1.0
    """Greatest weight."""
    off_policy_mask_threshold: float | None = None
    """Completions worse than usual that the policy has left by more than so many nats a token have no gradient; .5 is
    usual. Default: all have one."""
    importance_sampling_correction: Correction = "sequence_mask"
    """What makes up for a sampler whose probabilities are not quite the trainer's: a weight of each token or of each
    sequence, cut (truncate) at the bounds or 0 (mask) beyond them. It is 1 where they agree."""
    importance_sampling_clip_max: float | None = 3.0
    """Greatest weight."""
    importance_sampling_clip_min: float | None = None
    """Least weight."""
    sapo_temperature_pos: float = 1.0
    """Of sapo, where the advantage is above 0."""
    sapo_temperature_neg: float = 1.05
    """Elsewhere."""
    vespo_k_pos: float = 2.0
    """Of vespo, where the advantage is not negative: how much ratios below 1 count less."""
    vespo_lambda_pos: float = 3.0
    """How much ratios above 1 count less."""
    vespo_k_neg: float = 3.0
    """The same where the advantage is negative."""
    vespo_lambda_neg: float = 2.0
    """The same where the advantage is negative."""

    @property
    def clip(self) -> tuple[float, float]:
        """How far below and above."""
        low = self.epsilon if self.epsilon is not None else 0.4 if self.loss == "gmpo" else 0.2
        return low, low if self.epsilon_high is None else self.epsilon_high

    def __post_init__(self) -> None:
        check(self)


def check(config: GRPO) -> None:
    """Raises ValueError for settings that cannot be, or of which the others make no use."""

    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"objective.{name}: got {getattr(config, name)}; expected {expected}")

    positive = (
        "epsilon", "epsilon_high", "delta", "max_completion_length", "off_policy_mask_threshold",
        "sapo_temperature_pos", "sapo_temperature_neg", "importance_sampling_clip_max", "vespo_lambda_pos",
        "vespo_lambda_neg",
    )  # fmt: skip
    for name in positive:
        if (value := getattr(config, name)) is not None and not value > 0:
            refuse(name, "a number above 0")
    for name in ("beta", "entropy_coef", "entropy_coef_min", "entropy_coef_delta", "importance_sampling_clip_min"):
        if (value := getattr(config, name)) is not None and not 0 <= value < float("inf"):
            refuse(name, "a finite number, 0 or more")
    if config.loss == "cispo" and (config.epsilon_high is None or config.epsilon is not None):
        name = "epsilon_high" if config.epsilon_high is None else "epsilon"
        refuse(name, "for cispo, which bounds the ratio from above alone, epsilon_high (such as 5) and no epsilon")
    if not 0 <= config.top_entropy_quantile <= 1:
        refuse("top_entropy_quantile", "from 0 to 1")
    if config.entropy_coef_max < config.entropy_coef_min:
        refuse("entropy_coef_max", f"at least entropy_coef_min={config.entropy_coef_min}")
    least, most = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if least is not None and most is not None and not least < most:
        refuse("importance_sampling_clip_min", f"less than importance_sampling_clip_max={most}")
    if config.loss == "gmpo" and config.importance_sampling_level == "sequence":
        refuse("importance_sampling_level", "token for gmpo, which has one ratio a sequence as it is")
    if config.kl_in == "reward" and not config.beta:
        refuse("kl_in", "loss, or a beta above 0 to weigh it by")
    if config.multi_objective_aggregation == "normalize_then_sum":
        usual = GRPO()
        for name in ("kl_in", "baseline", "scale_rewards"):
            if getattr(config, name) != getattr(usual, name):
                refuse(name, f"{getattr(usual, name)} with normalize_then_sum, which compares in its own way")


def bonus(config: GRPO) -> bool:
    """Whether entropy is a part of the loss."""
    return config.entropy_coef > 0 or config.use_adaptive_entropy


def needs(config: GRPO) -> tuple[str, ...]:
    """Scores it asks for."""
    if bonus(config):
        return ("logp", ENTROPY)
    return ("logp", "entropy") if config.top_entropy_quantile < 1 else ("logp",)


def reports(config: GRPO) -> tuple[str, ...]:
    """What is measured besides."""
    return () if len(needs(config)) > 1 else ("entropy",)


def rollout_needs(config: GRPO) -> tuple[str, ...]:
    """What is scored once a rollout."""
    return ("old_logp", "ref_logp") if config.beta else ("old_logp",)


def estimate(config: GRPO, rollout: Batch, running: Carry) -> tuple[dict[str, jax.Array], Means, Carry]:
    """Adds ``advantage`` float32[N, T]; with ``mask_truncated_completions`` changes ``loss_mask``.

    Metrics: `rollouts.metrics`, ``frac_reward_zero_std`` (the share of sequences in whose group, or batch, all rewards
    are the same), ``kl`` where it is in the reward, and `ratios.sampling_metrics`."""
    metrics = rollouts.metrics(rollout)
    rollout = rollouts.counted(rollout, config.mask_truncated_completions)
    group = rollout["group"]
    if config.multi_objective_aggregation == "normalize_then_sum":
        advantage, deviation = advantages.decoupled(rollout["reward"], rollout["reward_weight"], group)
    else:
        reward = rollouts.combined(rollout["reward"], rollout["reward_weight"])
        if config.kl_in == "reward":
            kl, metrics["kl"] = ratios.of_rollout(config.kl_estimator, rollout)
            reward = reward - config.beta * jnp.sum(kl, axis=1)
        others = config.baseline == "leave_one_out"
        gain = advantages.leave_one_out(reward, group) if others else reward - advantages.group_mean(reward, group)
        advantage, deviation = advantages.scaled(gain, reward, group, config.scale_rewards)
    metrics["frac_reward_zero_std"] = advantages.without(deviation)
    if "old_logp" in rollout:
        mode = config.importance_sampling_correction
        weight = None if mode == "none" else _correction(config, rollout["old_logp"], rollout)
        metrics |= ratios.sampling_metrics(rollout, weight, ratios.level(mode))
    return rollouts.added(advantage, rollout, config.mask_truncated_completions), metrics, running


def _correction(config: GRPO, old: jax.Array, batch: Batch) -> jax.Array:
    bounds = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    return ratios.sampler_ratio(config.importance_sampling_correction, *bounds, old, batch)


def grpo(config: GRPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over completions; nats.

    Args:
      scores: ``policy`` with ``logp`` float32[B, T] and what else `needs` and `reports` name.
      batch: see `ratios`; for ``beta`` with ``ref_logp``, for a correction with ``sampler_logp``; and what `annotate`
        finds.
      carry: with ``use_adaptive_entropy`` that of `begin`.

    Returns the terms ``policy``, ``kl`` and ``entropy`` (each times its weight, those that there are), and the metrics
    ``kl`` (after the bias correction), ``entropy``, `ratios.clip_metrics`, for cispo ``cispo_clip_ratio`` and for vespo
    ``vespo/phi_seq_mean`` instead, and with a bonus ``policy_loss`` (without it) and ``entropy_coef``."""
    tokens, level = ratios.tokens(scores, batch), config.importance_sampling_level
    log_ratio = tokens.logp - tokens.old
    log_weight = ratios.log_weights(log_ratio, level, batch)
    loss, metrics = _surrogate(config, tokens, log_ratio, log_weight, batch)
    if config.off_policy_mask_threshold is not None:
        loss = jnp.where(ratios.near(tokens, config.off_policy_mask_threshold, batch), loss, 0.0)
    if "entropy_mask" in batch and config.loss != "gmpo":
        loss = jnp.where(batch["entropy_mask"], loss, 0.0)
    if config.importance_sampling_correction != "none" and config.loss != "vespo":
        loss = loss * jax.lax.stop_gradient(_correction(config, tokens.old, batch))
    losses = {"policy": averaged(config, loss, batch)}
    if config.beta and config.kl_in == "loss":
        kl = ratios.divergence(config.kl_estimator, tokens.logp, ratios.reference(tokens.logp, batch))
        kl = kl * jnp.exp(log_weight) if config.use_bias_correction_kl and config.loss != "gmpo" else kl
        mean = averaged(config, kl, batch)
        losses["kl"] = Mean(config.beta * mean.total, mean.weight)
        metrics["kl"] = terms.masked(kl, batch["loss_mask"])
    if bonus(config):
        losses["entropy"], more = _bonus(config, scores, batch, carry)
        total = losses["policy"].total + (losses["kl"].total if "kl" in losses else 0.0)
        metrics |= {"policy_loss": Mean(total, losses["policy"].weight), **more}
    elif "entropy" in scores["policy"]:
        metrics["entropy"] = terms.masked(scores["policy"]["entropy"], batch["loss_mask"])
    return losses, sequences.detached(metrics)


def averaged(config: GRPO, loss: jax.Array, batch: Batch) -> Mean:
    """The mean over what ``loss`` says. loss: float32[B, T]."""
    exists = batch["sequence_mask"]
    if config.loss in ("grpo", "sapo", "gmpo"):
        return terms.masked(sequences.means(loss, batch), exists)
    if config.loss in ("dr_grpo", "luspo"):
        mean = terms.masked(sequences.sums(loss, batch), exists)
        return Mean(mean.total, mean.weight * (config.max_completion_length if config.loss == "dr_grpo" else 1.0))
    return terms.masked(loss, batch["loss_mask"])


def _surrogate(
    config: GRPO, tokens: Tokens, log_ratio: jax.Array, log_weight: jax.Array, batch: Batch
) -> tuple[jax.Array, Means]:
    """The loss of each token, float32[B, T], and what is measured of its ratio."""
    (below, above), level = config.clip, config.importance_sampling_level
    advantage, ratio = tokens.advantage, jnp.exp(log_weight)
    if config.loss == "cispo":
        over = ((ratio > above) & (advantage > 0)).astype(jnp.float32)
        return surrogates.cispo(ratio, tokens, above), {"cispo_clip_ratio": ratios.over(over, level, batch)}
    if config.loss == "sapo":
        return surrogates.sapo(ratio, advantage, config.sapo_temperature_pos, config.sapo_temperature_neg), {}
    if config.loss == "vespo":
        mode, correction = config.importance_sampling_correction, None
        if mode != "none":
            log = jnp.log(_correction(config, tokens.old, batch))
            log = jnp.clip(log, ratios.LOG_LEAST, ratios.LOG_MOST)
            correction = (sequences.sums if ratios.level(mode) == "token" else sequences.means)(log, batch)
        shape = (config.vespo_k_pos, config.vespo_lambda_pos), (config.vespo_k_neg, config.vespo_lambda_neg)
        phi = surrogates.gamma_weights(log_ratio, advantage, *shape, correction, batch)
        loss = -sequences.of_token(phi, batch) * advantage * tokens.logp
        return loss, {"vespo/phi_seq_mean": terms.masked(phi, batch["sequence_mask"])}
    if config.loss == "gmpo":
        counted = batch.get("entropy_mask", batch["loss_mask"])
        loss = surrogates.gmpo(log_ratio, advantage, -below, above, counted, batch)
        low, high, level = log_ratio < -below, log_ratio > above, "token"
    else:
        loss = surrogates.clipped(ratio, advantage, 1.0 - below, 1.0 + above, config.delta)
        bounded = ratio if config.delta is None else jnp.minimum(ratio, config.delta)
        low, high = bounded < 1.0 - below, bounded > 1.0 + above
    return loss, ratios.clip_metrics(low & (advantage < 0), high & (advantage > 0), level, batch)


def _bonus(config: GRPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Mean, Means]:
    """The term, whose weight is the number of all tokens, and its metrics."""
    entropy, keep = scores["policy"][ENTROPY], batch["loss_mask"]
    each = batch.get("entropy_share", config.entropy_coef)
    bonus = terms.masked(-each * jnp.where(keep, entropy, 0.0), keep)
    weight, rows = carry.get("entropy_coef", jnp.float32(config.entropy_coef)), jnp.float32(keep.shape[0])
    return bonus, {"entropy": terms.masked(entropy, keep), "entropy_coef": Mean(weight * rows, rows)}


def begin(config: GRPO) -> Carry:
    """The weight of the entropy, and the entropy of the last step, of which nothing is known yet."""
    if not config.use_adaptive_entropy:
        return {}
    return {"entropy_coef": jnp.float32(config.entropy_coef), "last_entropy": jnp.float32(jnp.inf)}


def couples(config: GRPO) -> bool:
    """Whether it looks at all tokens of a step before any has a gradient."""
    return config.top_entropy_quantile < 1 or config.use_adaptive_entropy


def annotate(config: GRPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[dict[str, jax.Array], Carry]:
    """Finds ``entropy_mask`` bool[B, T], the tokens with the highest entropies of the step: Wang et al. 2025, eq. 7
    (arXiv:2506.01939); with a bonus ``entropy_share`` float32[B, T], what each token's entropy counts beside the number
    of all tokens. Follows the adaptive weight: He et al. 2025, section 4 (arXiv:2505.22312)."""
    keep, name = batch["loss_mask"], needs(config)[1]
    entropy, high, found = scores["policy"][name], keep, {}
    if config.top_entropy_quantile < 1:
        all_of_them = jnp.where(keep, entropy, jnp.nan)
        high = keep & (entropy >= jnp.nanquantile(all_of_them, 1.0 - config.top_entropy_quantile))
        found["entropy_mask"] = high
    if not bonus(config):
        return found, carry
    mean, weight = terms.masked(entropy, high), config.entropy_coef
    if config.use_adaptive_entropy:
        now = terms.divide(*mean)
        weight = jnp.where(carry["last_entropy"] <= config.entropy_target, carry["entropy_coef"], 0.0)
        change = jnp.where(now <= config.entropy_target, config.entropy_coef_delta, -config.entropy_coef_delta)
        after = jnp.clip(carry["entropy_coef"] + change, config.entropy_coef_min, config.entropy_coef_max)
        carry = {"entropy_coef": after, "last_entropy": now}
    number = jnp.sum(keep, dtype=jnp.float32)
    share = terms.divide(weight * number, mean.weight)
    found["entropy_share"] = jnp.where(high, share, 0.0)
    return found, carry
