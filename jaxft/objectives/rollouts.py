"""Rollouts: sequences that the policy wrote, with what reward functions said of them.

As arrays a rollout is N sequences, one a row, right-padded to T tokens; samples of one prompt are a group:

- ``loss_mask`` bool[N, T], the completion's tokens, the one that ends it included; ``segments`` int32[N, T], 1 and 0 in
  padding; ``sequence_mask`` bool[N, 1]
- ``group`` int32[N], the number of its prompt, from 0 to below N
- ``finished`` bool[N]: the policy ended it, no limit did
- ``reward`` float32[N, F], what each of F functions said, NaN where it said nothing; ``reward_weight`` float32[F]
- ``sampler_logp`` float32[N, T], nats, under the distribution that was sampled from; ``old_logp`` [N, T], the trainer's
  score of the same policy; ``ref_logp`` [N, T] and ``value`` [N, T] for an objective that asks for them

`Objective.estimate` adds what the step's batches then hold, so that rows can be packed and micro-batches cut.
"""

import jax
import jax.numpy as jnp

from jaxft.objectives import terms
from jaxft.objectives.terms import Batch, Carry, Mean, Means

FUNCTION = "rewards/{}/{}"
"""The metrics of one reward function, by its place among them: ``rewards/0/mean``, ``rewards/0/std``."""


def combined(reward: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted sum of what functions said of each sequence, float32[N]; NaN where none that counts said anything.

    reward: float32[N, F], NaN where a function said nothing; weight: float32[F], 0 of those that are only watched."""
    return jnp.where(jnp.all(jnp.isnan(reward) | (weight[None] == 0), axis=1), jnp.nan, weighted(reward, weight))


def weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The sum over F of ``x`` float32[N, F] times ``weight`` float32[F], NaN left out: float32[N]."""
    return jnp.sum(known(x) * weight[None], axis=1)


def spread(x: jax.Array, rollout: Batch) -> jax.Array:
    """What belongs to a sequence, float32[N], at each token of its completion: float32[N, T]; 0 elsewhere."""
    return jnp.where(rollout["loss_mask"], x[:, None], 0.0)


def counted(rollout: Batch, mask_truncated: bool) -> Batch:
    """The rollout in which completions that did not end have no token, if they are to be masked."""
    if not mask_truncated:
        return rollout
    return {**rollout, "loss_mask": rollout["loss_mask"] & rollout["finished"][:, None]}


def added(advantage: jax.Array, rollout: Batch, mask_truncated: bool) -> dict[str, jax.Array]:
    """What an estimate adds: ``advantage`` [N, T], of sequences [N] or of tokens [N, T], 0 where it is NaN, and the
    ``loss_mask`` of `counted` where that differs."""
    each = spread(advantage, rollout) if advantage.ndim == 1 else advantage
    return {"advantage": known(each)} | ({"loss_mask": rollout["loss_mask"]} if mask_truncated else {})


def lengths(rollout: Batch) -> jax.Array:
    """Tokens of each completion: float32[N]."""
    return jnp.sum(rollout["loss_mask"], axis=1, dtype=jnp.float32)


def known(x: jax.Array) -> jax.Array:
    """``x`` with 0 for NaN: what is not known moves nothing."""
    return jnp.where(jnp.isnan(x), jnp.zeros_like(x), x)


def mean(x: jax.Array) -> jax.Array:
    """The mean of what is not NaN; NaN where all is. x: float32 of any shape."""
    keep = ~jnp.isnan(x)
    return jnp.sum(jnp.where(keep, x, 0.0)) / jnp.sum(keep, dtype=jnp.float32)


def deviation(x: jax.Array) -> jax.Array:
    """The standard deviation of what is not NaN, of a sample (n - 1); NaN where that is less than two."""
    keep = ~jnp.isnan(x)
    square = jnp.sum(jnp.where(keep, jnp.square(x - mean(x)), 0.0))
    return jnp.sqrt(square / (jnp.sum(keep, dtype=jnp.float32) - 1.0))


def single(x: jax.Array) -> Mean:
    """A number that is already what it should be; left out (weight 0) where it is NaN."""
    return Mean(known(x), (~jnp.isnan(x)).astype(jnp.float32))


def observe(config: object, rollout: Batch, running: Carry) -> tuple[dict[str, jax.Array], Means, Carry]:
    """`Objective.estimate` of an objective that has no use for advantages: metrics alone."""
    del config
    return {}, metrics(rollout), running


def metrics(rollout: Batch) -> Means:
    """What is told of every rollout: ``reward`` and ``reward_std`` of the weighted sums, the mean and deviation of each
    function (`FUNCTION`), and lengths in tokens: ``completions/mean_length`` (min, max), the same of those that ended
    (``..._terminated_length``), and ``completions/clipped_ratio``, the share of those that did not."""
    reward = combined(rollout["reward"], rollout["reward_weight"])
    found = {"reward": single(mean(reward)), "reward_std": single(deviation(reward))}
    for number in range(rollout["reward"].shape[1]):
        said = rollout["reward"][:, number]
        found[FUNCTION.format(number, "mean")] = single(mean(said))
        found[FUNCTION.format(number, "std")] = single(deviation(said))
    length, finished = lengths(rollout), rollout["finished"]
    for name, keep in (("", jnp.ones_like(finished)), ("terminated_", finished)):
        found[f"completions/mean_{name}length"] = single(known(mean(jnp.where(keep, length, jnp.nan))))
        least, most = (jnp.where(keep, length, bound) for bound in (jnp.inf, -jnp.inf))
        found[f"completions/min_{name}length"] = single(jnp.where(jnp.any(keep), jnp.min(least), 0.0))
        found[f"completions/max_{name}length"] = single(jnp.where(jnp.any(keep), jnp.max(most), 0.0))
    found["completions/clipped_ratio"] = terms.masked((~finished).astype(jnp.float32), jnp.ones_like(finished))
    return found
