r"""Whether probabilities are what happens: the Brier score, and a reliability table with its expected error.

.. math:: \text{Brier} = \frac{1}{N} \sum_i (p_i - y_i)^2, \qquad
          \text{ECE} = \sum_b \frac{n_b}{N} \left| \bar y_b - \bar p_b \right|

Brier 1950 and Guo et al. 2017, eq. 3 (arXiv:1706.04599), over `BINS` bins b of equal width. The sums of each bin are
sums over the data, whatever its batches; the error is taken at the end, from the whole.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.objectives import terms
from jaxft.objectives.terms import Mean, Means

BINS = 10
SHARE, PREDICTED, OBSERVED = TABLE = ("reliability/share", "reliability/predicted", "reliability/observed")
ERROR = "calibration_error"


def brier(probability: jax.Array, outcome: jax.Array, keep: jax.Array) -> Mean:
    """Mean squared distance. probability: float32 of any shape; outcome, keep: bool of the same."""
    return terms.masked(jnp.square(probability - outcome.astype(jnp.float32)), keep)


def reliability(probability: jax.Array, outcome: jax.Array, keep: jax.Array, low: float = 0.0) -> Means:
    """The table, float32[BINS] each: the share of what falls in a bin, its mean probability, how often it happened.

    probability: float32 of any shape, from ``low`` to 1; outcome, keep: bool of the same."""
    place = jnp.floor((probability - low) * (BINS / (1.0 - low))).astype(jnp.int32)
    held = jax.nn.one_hot(jnp.clip(place, 0, BINS - 1).ravel(), BINS, dtype=bool) & keep.reshape(-1, 1)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(held, x.astype(jnp.float32).reshape(-1, 1), jnp.zeros((), jnp.float32)), axis=0)

    count = jnp.sum(held, axis=0, dtype=jnp.float32)
    share = Mean(count, jnp.broadcast_to(jnp.sum(count), (BINS,)))
    return {SHARE: share, PREDICTED: Mean(total(probability), count), OBSERVED: Mean(total(outcome), count)}


def concluded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the expected calibration error in the place of the table, if there is one."""
    if SHARE not in values:
        return dict(values)
    share, predicted, observed = (jnp.asarray(values[name], jnp.float32) for name in TABLE)
    rest = {name: value for name, value in values.items() if name not in TABLE}
    return {**rest, ERROR: float(jnp.sum(share * jnp.abs(observed - predicted)))}
