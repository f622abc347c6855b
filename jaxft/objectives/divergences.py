r"""f-divergences between policy and reference: what a completion's log-ratio counts for.

With the divergence :math:`D_f(\pi \| \pi_\text{ref}) = E_{\pi_\text{ref}}[f(\pi / \pi_\text{ref})]` in the place of the
reverse KL, the reward a policy stands for is :math:`\beta f'(u) + \text{const}`, with the ratio u of its probability to
the reference's: Wang et al. 2023, "Beyond Reverse KL", theorem 1 (arXiv:2309.16240). The constant is the
prompt's and cancels only between two completions of one prompt.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

LARGEST_EXPONENT = 80.0
"""Exponents end here, at 5.5e34, where what losses make of them is still float32. No gradient flows past it."""


def score(log_ratio: jax.Array, divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> jax.Array:
    """``f'(u)`` of each log-ratio ``log u``; nats, not reduced. log_ratio: float32, of any shape.

    ============================ =============================================
    reverse_kl                   log u
    forward_kl                   1 - 1/u
    js_divergence                log 2u/(1 + u)
    alpha_divergence             (u^(alpha - 1) - 1)/(alpha - 1)
    ============================ =============================================

    The alpha-divergence passes from forward KL (alpha = 0) to reverse KL (alpha = 1)."""
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return power(log_ratio, -1.0)
    if divergence == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(log_ratio)
    if divergence == "alpha_divergence":
        return power(log_ratio, alpha - 1)
    known = "reverse_kl, forward_kl, js_divergence, alpha_divergence"
    raise ValueError(f"f_divergence_type: got {divergence!r}; expected one of {known}")


def power(log_ratio: jax.Array, exponent: float) -> jax.Array:
    """``(u^exponent - 1) / exponent`` of ``log u``: the logarithm where the exponent is 0 (Box and Cox 1964)."""
    if abs(exponent) < 1e-6:
        return log_ratio
    largest = LARGEST_EXPONENT + min(0.0, math.log(10 * abs(exponent)))  # a small divisor must not undo it
    return jnp.expm1(jnp.minimum(exponent * log_ratio, largest)) / exponent
