r"""Advantages: how much better a completion is than what the policy usually writes.

All take the rewards of a rollout, float32[N], NaN where nothing is known of a sequence, which then counts nowhere and
has an advantage of NaN; ``group`` int32[N] says which sequences answer the same prompt.
"""

import jax
import jax.numpy as jnp

from jaxft.objectives import rollouts

EPSILON = 1e-4
"""Added to a standard deviation before it divides."""


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
