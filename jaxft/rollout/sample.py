"""Choosing the next token from logits: greedy, temperature, top-k, nucleus."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Static choices; the temperature itself is an array, so changing it does not recompile."""

    greedy: bool = False
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751)."""


def filtered(sampling: Sampling, logits_BV: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits divided by the temperature, those that may not be drawn at minus infinity: float32[B, V].

    As in `transformers`: temperature first, then top-k, then top-p; the most likely token always stays."""
    logits_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1.0:
        descending_BV = -jnp.sort(-logits_BV, axis=-1)
        p_BV = jax.nn.softmax(descending_BV, axis=-1)
        kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p  # mass before this token
        kept_BV = kept_BV.at[:, 0].set(True)
        floor_B1 = jnp.min(jnp.where(kept_BV, descending_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
    return logits_BV


def draw(
    sampling: Sampling, key: jax.Array, logits_BV: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Next tokens int32[B] and their log-probabilities float32[B] under the distribution they were drawn from.

    Greedy: the most likely token, with its log-probability at temperature 1."""
    if sampling.greedy:
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        logits_BV = filtered(sampling, logits_BV, temperature)
        tokens_B = jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return tokens_B, jnp.take_along_axis(logp_BV, tokens_B[:, None], axis=-1)[:, 0]
