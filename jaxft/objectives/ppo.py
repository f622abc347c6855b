r"""PPO: the whole recipe of learning from a reward model, with a value model beside the policy.

.. math:: r_t = -\beta\, \mathrm{kl}_t + [t \text{ is last}]\, s, \qquad
          L = -\overline{\min(\rho A, \mathrm{clip}(\rho, 1 - c, 1 + c) A)} +
              \frac{c_v}{2} \overline{\max((V - G)^2, (\mathrm{clip}(V, V_\text{old} - c', V_\text{old} + c') - G)^2)}

Schulman et al. 2017, eq. 7 and 9 (arXiv:1707.06347); Ouyang et al. 2022 (arXiv:2203.02155). Advantages A and returns G
are `advantages.generalised`, from the value V of the state that a token is written in; the score s counts at the last
token, after which V is 0. The weight β may follow the divergence: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import advantages, ratios, rollouts, sequences, surrogates, terms
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores

MOST = 0.2
"""How far from its target the divergence counts, as a share of it."""


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation with a value model, on completions that the policy writes and a reward judges."""

    kl_coef: float = 0.05
    """Weight of the divergence from the reference, taken from the reward of each token; where it adapts, the first."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """What estimates the divergence of a token: k1 or k3."""
    kl_target: float | None = None
    """Nats a completion that the divergence is held at, by a weight that adapts. Default: the weight is fixed."""
    kl_horizon: int = 10_000
    """Completions over which it adapts."""
    gamma: float = 1.0
    """What a reward counts at the token before, and so on."""
    lam: float = 0.95
    """How far ahead advantages look before they trust the value model: 1 to the end, 0 one token."""
    cliprange: float = 0.2
    """How far a token's probability ratio may go from 1 before it has no gradient."""
    vf_coef: float = 0.1
    """Weight of the value model's loss."""
    cliprange_value: float = 0.2
    """How far a value may go from what it was before it has no gradient."""
    whiten_rewards: bool = False
    """Whether the rewards of tokens have unit variance over a rollout."""
    missing_eos_penalty: float | None = None
    """What is taken from the score of a completion that did not end. Default: nothing."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name}: got {getattr(self, name)}; expected from 0 to 1")
        for name in ("kl_coef", "vf_coef", "missing_eos_penalty"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise ValueError(f"objective.{name}: got {value}; expected a finite number, 0 or more")
        for name in ("cliprange", "cliprange_value", "kl_target", "kl_horizon"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"objective.{name}: got {value}; expected a number above 0")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("objective.kl_coef: got 0 with kl_target; expected a first weight above 0, which adapts")


def rollout_needs(config: PPO) -> tuple[str, ...]:
    """What is scored once a rollout."""
    return ("old_logp", *(("ref_logp",) if config.kl_coef else ()), "value")


def begin(config: PPO) -> Carry:
    """The weight of the divergence, if it adapts."""
    return {"kl_coef": jnp.float32(config.kl_coef)} if config.kl_target is not None else {}


def before(value: jax.Array, batch: Batch) -> jax.Array:
    """The value of the state that each token is written in, float32[B, T]: what the value model says of its document up
    to the token before; 0 for the first. value: float32[B, T], of documents up to and with each token."""
    segments = batch["segments"]
    same = segments[:, 1:] == segments[:, :-1]
    return jnp.pad(jnp.where(same, value[:, :-1], 0.0), ((0, 0), (1, 0)))


def estimate(config: PPO, rollout: Batch, running: Carry) -> tuple[dict[str, jax.Array], Means, Carry]:
    """Adds ``advantage``, ``returns`` and ``old_value`` float32[N, T] (of the state before each token), and changes
    ``loss_mask``: a completion of which nothing is known teaches nothing.

    Metrics: `rollouts.metrics`, `ratios.sampling_metrics`, ``objective/kl``, ``objective/entropy``,
    ``objective/non_score_reward``, ``objective/scores`` and ``objective/rlhf_reward`` (means of sums over completions,
    nats), ``objective/kl_coef`` and ``val/num_eos_tokens`` (completions that ended)."""
    metrics = rollouts.metrics(rollout) | ratios.sampling_metrics(rollout)
    score, finished = rollouts.combined(rollout["reward"], rollout["reward_weight"]), rollout["finished"]
    if config.missing_eos_penalty is not None:
        score = score - jnp.where(finished, 0.0, config.missing_eos_penalty)
    known = ~jnp.isnan(score)
    keep = rollout["loss_mask"] & known[:, None]
    rollout, weight = {**rollout, "loss_mask": keep}, running.get("kl_coef", jnp.float32(config.kl_coef))
    kl = jnp.zeros(keep.shape, jnp.float32)
    if config.kl_coef:
        kl, _ = ratios.of_rollout(config.kl_estimator, rollout)
    reward = advantages.at_last(score, keep) - weight * kl
    if config.whiten_rewards:
        reward = advantages.whitened(reward, keep, shift=False)
    value = jnp.where(keep, before(rollout["value"], rollout), 0.0)
    advantage, returns = advantages.generalised(reward, value, keep, config.gamma, config.lam)
    added = {"advantage": advantages.whitened(advantage, keep), "returns": returns, "old_value": value}
    apart, taken = jnp.sum(kl, axis=1), jnp.sum(weight * kl, axis=1)
    sums = {
        "kl": apart,
        "entropy": -jnp.sum(jnp.where(keep, rollout["old_logp"], 0.0), axis=1),
        "non_score_reward": -taken,
        "scores": score,
        "rlhf_reward": score - taken,
    }
    metrics |= {f"objective/{name}": terms.masked(x, known) for name, x in sums.items()}
    metrics["objective/kl_coef"] = rollouts.single(weight)
    metrics["val/num_eos_tokens"] = rollouts.single(jnp.sum(finished, dtype=jnp.float32))
    if config.kl_target is not None:
        error = jnp.clip(terms.divide(*metrics["objective/kl"]) / config.kl_target - 1.0, -MOST, MOST)
        running = {"kl_coef": weight * (1.0 + error * score.shape[0] / config.kl_horizon)}
    return added | {"loss_mask": keep}, metrics, running


def ppo(config: PPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over tokens of completions.

    Args:
      scores: ``policy`` with ``logp`` float32[B, T] and, if there, ``entropy``; ``value`` with ``value`` float32[B, T],
        what the value model says of each document up to and with each token.
      batch: see `ratios`; ``returns`` and ``old_value`` float32[B, T].

    Returns the terms ``policy`` and ``value`` (times ``vf_coef``), and the metrics ``policy/approxkl_avg`` (nats a
    token), ``policy/clipfrac_avg``, ``policy/entropy_avg``, ``loss/policy_avg``, ``loss/value_avg`` (without the
    weight), ``val/clipfrac_avg``, ``val/ratio`` and ``val/ratio_var`` (over tokens, the variance: means over
    micro-batches)."""
    del carry
    tokens, keep = ratios.tokens(scores, batch), batch["loss_mask"]
    log_ratio = tokens.logp - tokens.old
    ratio, low, high = jnp.exp(log_ratio), 1.0 - config.cliprange, 1.0 + config.cliprange
    policy = surrogates.clipped(ratio, tokens.advantage, low, high)
    value, old, returns = (
        jnp.where(keep, x, 0.0) for x in (before(scores["value"]["value"], batch), batch["old_value"], batch["returns"])
    )
    free = jnp.square(value - returns)
    bound = jnp.square(jnp.clip(value, old - config.cliprange_value, old + config.cliprange_value) - returns)
    loss = terms.masked(jnp.maximum(free, bound) / 2, keep)
    losses = {"policy": terms.masked(policy, keep), "value": Mean(config.vf_coef * loss.total, loss.weight)}
    mean = terms.masked(ratio, keep)
    metrics = {
        "policy/approxkl_avg": terms.masked(jnp.square(log_ratio) / 2, keep),
        "policy/clipfrac_avg": terms.masked((policy > -ratio * tokens.advantage).astype(jnp.float32), keep),
        "loss/policy_avg": losses["policy"],
        "loss/value_avg": loss,
        "val/clipfrac_avg": terms.masked((bound > free).astype(jnp.float32), keep),
        "val/ratio": mean,
        "val/ratio_var": terms.masked(jnp.square(ratio - terms.divide(*mean)), keep),
    }
    if "entropy" in scores["policy"]:
        metrics["policy/entropy_avg"] = terms.masked(scores["policy"]["entropy"], keep)
    return losses, sequences.detached(metrics)
