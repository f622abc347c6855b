r"""Advantages: how much better a completion is than what the policy usually writes.

Of sequences: rewards float32[N], NaN where nothing is known of one, which then counts nowhere and has an advantage of
NaN; ``group`` int32[N] says which of them answer the same prompt. Of tokens: float32[N, T], and ``keep`` bool[N, T] the
policy's own, between which others (of a tool, say) are as if they were not there.
"""

import jax
import jax.numpy as jnp

from jaxft.objectives import rollouts, terms
from jaxft.objectives.terms import Mean

EPSILON = 1e-4
"""Added to a standard deviation before it divides."""
ZERO = 1e-8
"""What a standard deviation is at most where all rewards are the same."""


def group_sum(x: jax.Array, group: jax.Array) -> jax.Array:
    """The sum over each sequence's group of what is not NaN: float32[N]."""
    return jax.ops.segment_sum(rollouts.known(x), group, num_segments=x.shape[0])[group]


def group_size(x: jax.Array, group: jax.Array) -> jax.Array:
    """How many of each sequence's group are not NaN: float32[N]."""
    return group_sum((~jnp.isnan(x)).astype(jnp.float32), group)


def group_mean(x: jax.Array, group: jax.Array) -> jax.Array:
    """float32[N]; NaN for a group of which nothing is known."""
    return group_sum(x, group) / group_size(x, group)


def group_deviation(x: jax.Array, group: jax.Array) -> jax.Array:
    """The standard deviation of each sequence's group (n - 1), float32[N]: NaN where less than two of its sequences are
    known, and 0 in a group of one."""
    square = group_sum(jnp.square(x - group_mean(x, group)), group)
    found = jnp.sqrt(square / (group_size(x, group) - 1.0))
    return jnp.where(group_sum(jnp.ones_like(x), group) == 1, jnp.zeros_like(found), found)


def leave_one_out(x: jax.Array, group: jax.Array) -> jax.Array:
    """The reward less the mean of the others of its group, float32[N]; NaN where there are none.

    Kool et al. 2019; Ahmadian et al. 2024, eq. 7 (arXiv:2402.14740)."""
    return x - (group_sum(x, group) - x) / (group_size(x, group) - 1.0)


def scaled(advantage: jax.Array, reward: jax.Array, group: jax.Array, by: str) -> tuple[jax.Array, jax.Array]:
    """The advantage over the deviation of the rewards of its group, of the whole batch, or as it is (``none``), and
    that deviation (of ``none``: the group's). float32[N] each."""
    whole = jnp.broadcast_to(rollouts.deviation(reward), reward.shape)
    deviation = whole if by == "batch" else group_deviation(reward, group)
    return (advantage if by == "none" else advantage / (deviation + EPSILON)), deviation


def without(deviation: jax.Array) -> Mean:
    """The share of sequences where all rewards are the same. deviation: float32[N]."""
    return terms.masked((deviation <= ZERO).astype(jnp.float32), jnp.ones_like(deviation, bool))


def decoupled(reward: jax.Array, weight: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GDPO: each function's rewards are normalised in their group before they are added, and their sum in the batch.

    reward: float32[N, F]; weight: float32[F]. Returns the advantage and the deviation of the sums, float32[N] each.
    Liu et al. 2026 (arXiv:2601.05242)."""

    def normalised(x: jax.Array) -> jax.Array:
        return (x - group_mean(x, group)) / (group_deviation(x, group) + EPSILON)

    each = jax.vmap(normalised, in_axes=1, out_axes=1)(reward)
    total = rollouts.weighted(each, weight)
    total = jnp.where(jnp.all(jnp.isnan(reward) | (weight[None] == 0), axis=1), jnp.nan, total)
    deviation = rollouts.deviation(total)
    return (total - rollouts.mean(total)) / (deviation + EPSILON), jnp.broadcast_to(deviation, total.shape)


def whitened(x: jax.Array, keep: jax.Array, shift: bool = True) -> jax.Array:
    """Zero mean (unless not ``shift``) and unit variance (n - 1) over all that is kept; 0 elsewhere. Of any shape."""
    count = jnp.sum(keep, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(keep, x, 0.0)) / jnp.maximum(count, 1.0)
    centred = jnp.where(keep, x - mean, 0.0)
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1.0, 1.0)
    out = centred * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(keep, out if shift else out + mean, 0.0)


def at_last(x: jax.Array, keep: jax.Array) -> jax.Array:
    """``x`` float32[N] at the last token kept of each row, float32[N, T]; 0 elsewhere."""
    last = jnp.cumsum(keep[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1] == 1
    return jnp.where(keep & last, x[:, None], 0.0)


def discounted(reward: jax.Array, keep: jax.Array, gamma: float) -> jax.Array:
    """What is still to come from each token on: the sum of gamma^(s - t) r_s over s ≥ t, float32[N, T]."""

    def back(total: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reward, keep = now
        total = jnp.where(keep, reward + gamma * total, total)
        return total, total

    _, found = jax.lax.scan(back, jnp.zeros(reward.shape[:1], jnp.float32), (reward.T, keep.T), reverse=True)
    return jnp.where(keep, found.T, 0.0)


def generalised(
    reward: jax.Array, value: jax.Array, keep: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    r"""Generalised advantage estimates and the returns that a value model learns, float32[N, T] each.

    .. math:: A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad
              G_t = A_t + V_t

    Schulman et al. 2016, eq. 16 (arXiv:1506.02438). value: float32[N, T], of the state that each token is written in;
    after the last token kept it is 0."""

    def back(later: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]):
        advantage, following = later
        reward, value, keep = now
        found = reward + gamma * following - value + gamma * lam * advantage
        later = jnp.where(keep, found, advantage), jnp.where(keep, value, following)
        return later, later[0]

    zero = jnp.zeros(reward.shape[:1], jnp.float32)
    _, found = jax.lax.scan(back, (zero, zero), (reward.T, value.T, keep.T), reverse=True)
    advantage = jnp.where(keep, found.T, 0.0)
    return advantage, jnp.where(keep, advantage + value, 0.0)
