"""Quantisation by blocks, each scaled by its largest magnitude (Dettmers et al. 2022, arXiv:2110.02861)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.quant.codebooks import Codebook, dynamic

NESTED = 256
"""Numbers in a block of eight-bit codes: of the scales in double quantisation, of an optimiser's moments."""


def indices(x: jax.Array, largest: jax.Array, book: Codebook) -> jax.Array:
    """uint8, like ``x``: the codebook's index nearest to ``x / largest`` (broadcast), the lower one half way between.

    As in bitsandbytes the division is a product with the inverse."""
    scaled = x * jnp.where(largest > 0, 1.0 / largest, 0.0)
    if len(book.midpoints) < NESTED // 2:  # a sum of comparisons is one fused pass
        rank = functools.reduce(jnp.add, [(scaled > m).astype(jnp.uint8) for m in book.midpoints])
    else:
        rank = jnp.searchsorted(jnp.asarray(book.midpoints), scaled).astype(jnp.uint8)
    return rank if np.all(np.diff(book.order) == 1) else jnp.asarray(book.order.astype(np.uint8))[rank]


def look_up(index: jax.Array, values: np.ndarray) -> jax.Array:
    """``values[index]`` for a table whose size is a power of two.

    A small table is a tree of selects on the index's bits: no device gathers single numbers well."""
    if len(values) > 16:
        return jnp.asarray(values).at[index].get(mode="promise_in_bounds")
    level: list[jax.Array] = [jnp.float32(float(v)) for v in values]  # scalars, as kernels can hold no table
    bit = 1
    while len(level) > 1:
        odd = (index & bit) != 0
        level = [jnp.where(odd, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
        bit *= 2
    return level[0]


def nest(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Double quantisation of float32[*stack, n] scales: (uint8[*stack, n], float32[*stack, n/256], float32[*stack]).

    Their mean (the offset) is taken off and the rest goes to the 8-bit dynamic data type in blocks of 256 (Dettmers et
    al. 2023, section 3, arXiv:2305.14314)."""
    offset = jnp.mean(scales, axis=-1)
    apart = blocks(scales - offset[..., None])
    largest = jnp.max(jnp.abs(apart), axis=-1)
    codes = indices(apart, largest[..., None], dynamic())
    return codes.reshape(*scales.shape[:-1], -1)[..., : scales.shape[-1]], largest, offset


def unnest(codes: jax.Array, nested: jax.Array, offset: jax.Array) -> jax.Array:
    """The scales float32[*stack, n] again."""
    made = look_up(blocks(codes), dynamic().values) * nested[..., None]
    return made.reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]] + offset[..., None]


def blocks(x: jax.Array) -> jax.Array:
    """[*stack, n] -> [*stack, ceil(n/256), 256], filled up with zeros."""
    pad = -x.shape[-1] % NESTED
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x
    return x.reshape(*x.shape[:-1], -1, NESTED)
