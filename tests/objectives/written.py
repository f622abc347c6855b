"""Completions that a policy wrote: one a row as trl has them, and packed as the step has them."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.objectives import terms
from tests.objectives import completions
from tests.objectives.completions import Sequences
from tests.objectives.whole import annotated


@dataclass(frozen=True)
class Written(Sequences):
    """Of N sequences besides, [N, LENGTH] and (advantage) [N]."""

    old: np.ndarray
    sampler: np.ndarray
    advantage: np.ndarray

    def ratio(self, config) -> np.ndarray:
        """What makes up for the sampler, [N, LENGTH] or [N, 1]: by its definition."""
        mode = config.importance_sampling_correction
        apart = np.nan_to_num(np.where(self.completion, self.old - self.sampler, 0.0))
        ratio = np.exp(apart.sum(1, keepdims=True) if mode.startswith("sequence") else apart)
        least, most = config.importance_sampling_clip_min or -np.inf, config.importance_sampling_clip_max or np.inf
        if mode.endswith("truncate"):
            return np.clip(ratio, least, most)
        return np.where((ratio < least) | (ratio > most), 0.0, ratio).astype(np.float32)


def draw(count: int = 8, seed: int = 0, odd: bool = True, apart: float = 0.3) -> Written:
    """``odd``: tokens that are not the policy's within completions, one of which has none of its own, and one that the
    sampler could not score. ``apart``: deviation of the log-probs of old policy, sampler and reference."""
    given, rng = completions.draw(count, seed), np.random.default_rng(seed + 50)
    near = lambda: (given.logp + rng.normal(0, apart, given.logp.shape)).astype(np.float32)  # noqa: E731
    old, ref, completion = near(), near(), given.completion
    sampler = (old + rng.normal(0, apart / 2, old.shape)).astype(np.float32)
    if odd:
        completion = completion & (rng.random(completion.shape) < 0.8)
        completion[1] = False
        sampler[np.unravel_index(np.flatnonzero(completion)[3], sampler.shape)] = np.nan
    made = dataclasses.replace(given, ref=ref, completion=completion)
    advantage = rng.normal(0, 1, count).astype(np.float32)
    advantage[2] = 0.0
    return Written(**vars(made), old=old, sampler=sampler, advantage=advantage)


def rows(given: Written, a_row: int = 2, pad: int = 3, room: int = 1) -> tuple[dict, dict]:
    """(scores, batch) with ``a_row`` sequences in a row; see `completions.rows`."""

    def lay(x: np.ndarray) -> jax.Array:
        x = np.broadcast_to(x[:, None], given.logp.shape) if x.ndim == 1 else x
        return completions.rows(dataclasses.replace(given, ref=x), a_row, pad, room)[0]["reference"]["logp"]

    scores, batch = completions.rows(given, a_row, pad, room)
    policy = {name: scores["policy"][name] for name in ("logp", "entropy")}
    policy["trained_entropy"] = policy["entropy"]
    named = {"old_logp": given.old, "sampler_logp": given.sampler, "ref_logp": given.ref, "advantage": given.advantage}
    return {"policy": policy}, batch | {name: lay(x) for name, x in named.items()}


def total(row, config, scores, batch, carry=None):
    """(loss, gradients by score, metrics, carry) of a batch as a whole; not compiled: once, that takes longer."""
    more, carry = annotated(row, config, scores, batch, carry or {})

    def fn(policy):
        losses, metrics = row.fn(config, {**scores, "policy": {**scores["policy"], **policy}}, more, carry)
        return sum(terms.values(losses).values()), metrics

    leaves = {name: x for name, x in scores["policy"].items() if name in ("logp", "trained_entropy")}
    (value, metrics), grads = jax.value_and_grad(fn, has_aux=True)(leaves)
    return value, grads, terms.values(metrics), carry


def rollout(given: Written, reward: np.ndarray, samples: int, weight=None, finished=None) -> dict[str, jax.Array]:
    """A whole rollout, one sequence a row, groups of ``samples``. reward: [N, F]."""
    _, batch = rows(given, a_row=1, room=0)
    count = len(given.logp)
    return {name: x for name, x in batch.items() if name != "advantage"} | {
        "group": jnp.arange(count) // samples,
        "finished": jnp.asarray(np.ones(count, bool) if finished is None else finished),
        "reward": jnp.asarray(reward, jnp.float32),
        "reward_weight": jnp.ones(reward.shape[1]) if weight is None else jnp.asarray(weight, jnp.float32),
    }
