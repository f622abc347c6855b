"""Choosing the next token from logits: penalties, temperature, top-k, nucleus, min-p.

Each filter is a least logit: whatever lies below the highest of them is not drawn. Unusual: nothing is sorted. The k-th
largest logit, and the least one of a nucleus, are found bit by bit: float32 numbers, read as integers that are ordered
as they are, have 32 bits, and each is settled by one pass over the row.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Static choices: which filters there are. Their values are arrays (`Knobs`), so changing one compiles nothing."""

    greedy: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False


class Knobs(NamedTuple):
    """The values, float32[] or int32[]."""

    temperature: jax.Array
    top_k: jax.Array
    """int32: draw from the k most likely tokens."""
    top_p: jax.Array
    """Draw from the smallest set of tokens whose probability reaches this (Holtzman et al. 2019, arXiv:1904.09751)."""
    min_p: jax.Array
    """Draw from tokens at least this likely, relative to the most likely (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition: jax.Array
    """Divides the positive logits of tokens that occurred, prompt included, and multiplies the negative (Keskar et al.
    2019, arXiv:1909.05858)."""
    presence: jax.Array
    """Subtracted from the logits of tokens that were generated."""
    frequency: jax.Array
    """Subtracted from the logits of tokens as many times as they were generated."""


class Drawn(NamedTuple):
    """Next tokens int32[B], and their log-probabilities float32[B]."""

    token_B: jax.Array
    logp_B: jax.Array
    """Under the distribution they were drawn from; greedy: under the policy's own with penalties."""
    policy_logp_B: jax.Array
    """Under the policy's own distribution, before any temperature, filter or penalty."""


def penalised(knobs: Knobs, logits_BV: jax.Array, prompt_BV: jax.Array, made_BV: jax.Array) -> jax.Array:
    """Logits less what tokens lose for having occurred: ``prompt`` bool[B, V] in the prompt, ``made`` int32[B, V] times
    in the completion."""
    occurred_BV = prompt_BV | (made_BV > 0)
    over_BV = jnp.where(logits_BV > 0, logits_BV / knobs.repetition, logits_BV * knobs.repetition)
    logits_BV = jnp.where(occurred_BV, over_BV, logits_BV)
    return logits_BV - knobs.presence * (made_BV > 0) - knobs.frequency * made_BV.astype(jnp.float32)


def filtered(sampling: Sampling, knobs: Knobs, logits_BV: jax.Array) -> jax.Array:
    """Logits divided by the temperature, those that may not be drawn at minus infinity: float32[B, V].

    As in `transformers`: temperature, then top-k, top-p and min-p, each of what the one before left; the most likely
    token always stays, and so do all that are as likely as the last that stays."""
    logits_BV = logits_BV / jnp.maximum(knobs.temperature, 1e-6)
    peak_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    if sampling.top_k:
        enough = lambda keep_BV: jnp.sum(keep_BV, axis=-1) >= knobs.top_k  # noqa: E731
        logits_BV = _above(logits_BV, least(logits_BV, enough))
    if sampling.top_p:
        p_BV = jax.nn.softmax(logits_BV, axis=-1)
        reached = lambda keep_BV: jnp.sum(jnp.where(keep_BV, p_BV, 0.0), axis=-1) >= knobs.top_p  # noqa: E731
        logits_BV = _above(logits_BV, jnp.minimum(least(logits_BV, reached), peak_B1[:, 0]))
    if sampling.min_p:
        logits_BV = _above(logits_BV, peak_B1[:, 0] + jnp.log(knobs.min_p))
    return logits_BV


def _above(logits_BV: jax.Array, least_B: jax.Array) -> jax.Array:
    return jnp.where(logits_BV < least_B[:, None], -jnp.inf, logits_BV)


def least(x_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The highest float32[B] for which ``enough(x >= it)`` bool[B] holds, where it holds the more the lower it is."""
    bits_BV = jax.lax.bitcast_convert_type(x_BV.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def settle(i: jax.Array, found_B: jax.Array) -> jax.Array:
        tried_B = found_B | (sign >> i.astype(jnp.uint32))
        return jnp.where(enough(ordered_BV >= tried_B[:, None]), tried_B, found_B)

    found_B = jax.lax.fori_loop(0, 32, settle, jnp.zeros(x_BV.shape[0], jnp.uint32))
    bits_B = jnp.where(found_B >= sign, found_B ^ sign, ~found_B)
    return jax.lax.bitcast_convert_type(bits_B, jnp.float32)


def draw(
    sampling: Sampling,
    knobs: Knobs,
    keys_B: jax.Array,
    logits_BV: jax.Array,
    occurred: tuple[jax.Array, jax.Array] | None = None,
) -> Drawn:
    """Next tokens, each row's with a key of its own. ``occurred``: what `penalised` asks for; None: no penalties."""
    policy_BV = logits_BV = logits_BV.astype(jnp.float32)
    if sampling.penalties and occurred is not None:
        logits_BV = penalised(knobs, logits_BV, *occurred)
    if sampling.greedy:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        logits_BV = filtered(sampling, knobs, logits_BV)
        token_B = categorical(keys_B, logits_BV)
    return Drawn(token_B, _logp(logits_BV, token_B), _logp(policy_BV, token_B))


BLOCK = 256
"""Tokens of a block in `categorical`."""


def categorical(keys_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """A draw from each row's distribution, int32[B]: the token where the sum of probabilities passes a uniform number.

    First the block of tokens, then the token in it: one random number a row, where Gumbel's trick needs one a token."""
    B, V = logits_BV.shape
    blocks = -(-V // BLOCK)
    peak_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    p_BV = jnp.pad(jnp.exp(logits_BV - peak_B1), ((0, 0), (0, blocks * BLOCK - V)))
    p_BnC = p_BV.reshape(B, blocks, BLOCK)
    upto_Bn = jnp.cumsum(jnp.sum(p_BnC, axis=-1), axis=-1)
    u_B = jax.vmap(lambda key: jax.random.uniform(key))(keys_B) * upto_Bn[:, -1]
    block_B, before_B = _passed(upto_Bn, u_B)
    p_BC = jnp.take_along_axis(p_BnC, block_B[:, None, None], axis=1)[:, 0]
    token_B, _ = _passed(jnp.cumsum(p_BC, axis=-1), u_B - before_B)
    return block_B * BLOCK + token_B


def _passed(upto_Bn: jax.Array, u_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first place where the growing sums pass ``u``, int32[B], and the sum before it; where rounding leaves ``u``
    at the last sum or beyond, the first place that reaches it."""
    below_B1 = jnp.minimum(u_B[:, None], jnp.nextafter(upto_Bn[:, -1:], jnp.float32(0)))
    at_B = jnp.sum(upto_Bn <= below_B1, axis=-1).astype(jnp.int32)
    before_B = jnp.take_along_axis(upto_Bn, jnp.maximum(at_B - 1, 0)[:, None], axis=-1)[:, 0]
    return at_B, jnp.where(at_B > 0, before_B, 0.0)


def _logp(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
