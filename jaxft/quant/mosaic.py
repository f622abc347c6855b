"""A kernel for four-bit matrices on TPUs, in Pallas: few rows times the packed matrix, a tile of codes at a time.

It reads a quarter of the bytes that bfloat16 has and never writes the dense matrix. Looking numbers up takes the vector
unit some twenty instructions for each eight thousand of them, so it pays where memory is slow beside that unit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxft.quant import blockwise
from jaxft.quant.codebooks import four_bit

DEPTH, WIDTH = 512, 512
"""Of the matrix, in a tile, at most."""


def fits(w: Any) -> bool:
    """Whether a weight divides into tiles."""
    return w.codes.ndim == 2 and _tile(w)[0] > 0 and _tile(w)[1] > 0


def _tile(w: Any) -> tuple[int, int]:
    """(rows, columns) of a tile of the matrix: whole blocks, eight or all of their scales."""
    size, out = 2 * w.codes.shape[0], w.codes.shape[1]
    deep = next((n for n in (8 * w.block, size) if size % n == 0 and n <= max(DEPTH, 8 * w.block)), 0)
    return deep, next((n for n in (WIDTH, 256, 128) if out % n == 0), 0)


def product(x: jax.Array, w: Any, interpret: bool = False) -> jax.Array:
    """``x @ w`` for few rows: bfloat16[rows, in] -> float32[rows, out]."""
    rows, size = x.shape
    out, half, (deep, wide) = w.codes.shape[1], w.block // 2, _tile(w)
    x = jnp.pad(x, ((0, -rows % 16), (0, 0)))
    apart = x.reshape(x.shape[0], size // w.block, 2, half)
    first, second = (apart[:, :, i].reshape(x.shape[0], size // 2) for i in range(2))
    kernel = functools.partial(_product, four_bit(w.kind).values, half)
    left = pl.BlockSpec((x.shape[0], deep // 2), lambda j, k: (0, k))
    made = pl.pallas_call(
        kernel,
        grid=(out // wide, size // deep),
        in_specs=[
            left,
            left,
            pl.BlockSpec((deep // 2, wide), lambda j, k: (k, j)),
            pl.BlockSpec((deep // w.block, wide), lambda j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((x.shape[0], wide), lambda j, k: (0, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], out), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="product_four_bit",
    )(first, second, w.codes, w.scales())
    return made[:rows]


def _product(values, half, first, second, codes, scales, out):
    @pl.when(pl.program_id(1) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    byte = codes[...].astype(jnp.int32)
    scale = scales[...]
    wide = scale.shape[1]
    scale = jnp.broadcast_to(scale[:, None], (scale.shape[0], half, wide)).reshape(byte.shape)
    for x, code in ((first, byte >> 4), (second, byte & 15)):
        numbers = (blockwise.look_up(code, values) * scale).astype(jnp.bfloat16)
        once = jax.lax.Precision.DEFAULT  # both are bfloat16
        out[...] += jnp.dot(x[...], numbers, precision=once, preferred_element_type=jnp.float32)
