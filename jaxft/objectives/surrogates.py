r"""Losses of tokens whose gradient is the policy gradient, each with its own way to stay near the old policy.

With the ratio :math:`\rho` of the new and the old probability, of a token or of its sequence, and the advantage A:

- clipped: :math:`-\min(\rho A, \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon_h) A)`, Schulman et al. 2017, eq. 7
  (arXiv:1707.06347); ``delta`` bounds the ratio also where A is negative (arXiv:2505.07291)
- cispo: :math:`-\mathrm{sg}(\min(\rho, \epsilon_h)) A \log \pi`, MiniMax 2025, eq. 4 (arXiv:2506.13585)
- sapo: :math:`-\frac{4}{\tau} \sigma(\tau (\rho - 1)) A`, with one τ for A > 0 and one for others (arXiv:2511.20347)
- vespo: :math:`-\mathrm{sg}(\varphi(w)) A \log \pi`, :math:`\varphi(w) = e^{\lambda} w^k e^{-\lambda w}` of the
  product w of a sequence's ratios, with (k, λ) by the sign of A (arXiv:2602.10693)
- gmpo: :math:`-A \exp \frac{1}{n} \sum_t \log \rho_t`, each log-ratio clipped on the side where A would go on
  (arXiv:2507.20673)

All float32[B, T], not reduced.
"""

import jax
import jax.numpy as jnp

from jaxft.objectives import ratios, sequences
from jaxft.objectives.ratios import Tokens
from jaxft.objectives.terms import Batch


def clipped(ratio: jax.Array, advantage: jax.Array, low: float, high: float, delta: float | None = None) -> jax.Array:
    """See above; ``low`` and ``high`` are the bounds of the ratio themselves."""
    inside = jnp.clip(ratio, low, high)
    outside = ratio if delta is None else jnp.minimum(ratio, delta)
    return -jnp.minimum(outside * advantage, inside * advantage)


def cispo(ratio: jax.Array, tokens: Tokens, most: float) -> jax.Array:
    """See above."""
    return -jax.lax.stop_gradient(jnp.minimum(ratio, most)) * tokens.advantage * tokens.logp


def sapo(ratio: jax.Array, advantage: jax.Array, positive: float, negative: float) -> jax.Array:
    """See above."""
    temperature = jnp.where(advantage > 0, positive, negative)
    return -jax.nn.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature * advantage


def gamma_weights(
    log_ratio: jax.Array,
    advantage: jax.Array,
    positive: tuple[float, float],
    negative: tuple[float, float],
    correction: jax.Array | None,
    batch: Batch,
) -> jax.Array:
    """The weight φ of each sequence, without a gradient: float32[B, S]. ``positive`` and ``negative``: (k, λ) by the
    sign of the advantage; ``correction`` float32[B, S]: the log of another factor of w."""
    log_weight = sequences.sums(jnp.clip(log_ratio, -ratios.LOG_MOST, ratios.LOG_MOST), batch)
    log_weight = log_weight if correction is None else log_weight + correction
    log_weight = jnp.clip(log_weight, ratios.LOG_LEAST, ratios.LOG_MOST)
    better = sequences.means(advantage, batch) >= 0
    power, decay = (jnp.where(better, *pair) for pair in zip(positive, negative, strict=True))
    decay = jnp.maximum(decay, 1e-4)
    phi = jnp.exp(decay + power * log_weight - decay * jnp.exp(log_weight))
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(phi), phi, 0.0))


def gmpo(
    log_ratio: jax.Array, advantage: jax.Array, low: float, high: float, counted: jax.Array, batch: Batch
) -> jax.Array:
    """See above: the loss of a sequence at each of its tokens. ``low`` and ``high``: of the log-ratio; ``counted``
    bool[B, T], the tokens of the geometric mean."""
    inside = jnp.clip(log_ratio, low, high)
    bounded = jnp.where(advantage > 0, jnp.minimum(log_ratio, inside), jnp.maximum(log_ratio, inside))
    number = jnp.maximum(sequences.sums(counted.astype(jnp.float32), batch), 1.0)
    weight = jnp.exp(sequences.sums(jnp.where(counted, bounded, 0.0), batch) / number)
    return -sequences.of_token(weight, batch) * advantage
