r"""GRPO: the policy gradient of completions compared with others of the same prompt, in a trust region."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.objectives import advantages, rollouts, sequences, terms
from jaxft.objectives.terms import Batch, Carry, Means, Scores


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation, on completions that the policy writes and reward functions judge."""

    epsilon: float = 0.2
    """How far a token's probability ratio may go from 1 before it has no gradient."""
    mask_truncated: bool = False
    """Whether completions that did not end count nowhere."""


def estimate(config: GRPO, rollout: Batch, running: Carry) -> tuple[dict[str, jax.Array], Means, Carry]:
    """Adds ``advantage`` float32[N, T]."""
    reward, group = rollouts.combined(rollout["reward"], rollout["reward_weight"]), rollout["group"]
    deviation = advantages.group_deviation(reward, group)
    advantage = (reward - advantages.group_mean(reward, group)) / (deviation + advantages.EPSILON)
    added = {"advantage": rollouts.spread(rollouts.known(advantage), rollout)}
    if config.mask_truncated:
        added["loss_mask"] = rollout["loss_mask"] & rollout["finished"][:, None]
    metrics = rollouts.metrics(rollout)
    metrics["frac_reward_zero_std"] = terms.masked((deviation == 0).astype(jnp.float32), jnp.ones_like(reward, bool))
    return added, metrics, running


def grpo(config: GRPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over completions' tokens; nats."""
    del carry
    logp, keep, advantage = scores["policy"]["logp"], batch["loss_mask"], batch["advantage"]
    old = batch["old_logp"] if "old_logp" in batch else jax.lax.stop_gradient(logp)
    ratio = jnp.exp(jnp.where(keep, logp - old, 0.0))
    clipped = jnp.clip(ratio, 1 - config.epsilon, 1 + config.epsilon)
    loss = -jnp.minimum(ratio * advantage, clipped * advantage)
    return {"policy": terms.masked(loss, keep)}, sequences.token_metrics(scores, batch, keep)
