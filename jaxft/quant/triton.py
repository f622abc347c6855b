"""Kernels for four-bit matrices on NVIDIA GPUs, in Pallas: made dense at the speed of memory, and multiplied packed.

Unusual: a tile of bytes is two tiles of numbers, so many rows apart as half a block has, and nothing is interleaved.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxft.quant import blockwise, ptx
from jaxft.quant.codebooks import dynamic, four_bit

ROWS = 32
"""Rows of bytes in a tile: those of half a block of 64."""


def dense(w: Any, columns: int = 128, warps: int = 4, interpret: bool = False) -> jax.Array:
    """The matrix [in, out] of a four-bit weight in the dtype it was made from, equal to `FourBit.dense`."""
    return _made(w, None, w.dense_dtype, False, columns, warps, interpret)


def eight_bits(
    w: Any, over: jax.Array, dtype: Any, transposed: bool, columns: int = 128, warps: int = 4, interpret: bool = False
) -> jax.Array:
    """The numbers of a four-bit weight, those of column j divided by ``over`` float32[out], in int8 or fp8: [in, out],
    or [out, in]."""
    return _made(w, over, dtype, transposed, columns, warps, interpret)


def _made(w: Any, over: Any, dtype: Any, transposed: bool, columns: int, warps: int, interpret: bool) -> jax.Array:
    (bytes_, out), w = w.codes.shape, jax.tree.map(lambda a: a[None], w)
    shape = (out, 2 * bytes_) if transposed else (2 * bytes_, out)
    divided = () if over is None else (over,)
    return pl.pallas_call(
        functools.partial(_tile, w.kind, w.block // 2, transposed, columns, len(divided), interpret),
        grid=(bytes_ // ROWS, out // columns),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="dense_four_bit",
    )(*divided, *_arrays(w))


def _tile(kind, half, transposed, columns, divided, interpret, *refs):
    (*over, codes, absmax), (*nested, out) = refs[: 2 + divided], refs[2 + divided :]
    at, block = pl.program_id(0) * ROWS, jax.lax.div(pl.program_id(0) * ROWS, half)
    start = at + block * half
    across = pl.ds(pl.program_id(1) * columns, columns)
    scale = _scale(0, block, across, absmax, *nested)
    if over:
        scale /= over[0][across]
    byte = codes[0, pl.ds(at, ROWS), across]
    for first, high in ((start, True), (start + half, False)):
        tile = _numbers(kind, byte, high, interpret) * scale[None]
        if out.dtype == jnp.int8:
            tile = jnp.floor(tile + 0.5)
        tile = tile.astype(out.dtype)
        if transposed:
            out[across, pl.ds(first, ROWS)] = tile.T
        else:
            out[pl.ds(first, ROWS), across] = tile


def product(
    x: jax.Array, w: Any, index: Any = None, columns: int = 128, splits: int = 8, warps: int = 4, dot: bool = False,
    ahead: bool = True, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """``x @ w`` for few rows: bfloat16[rows, in] -> float32[rows, out], the codebook rounded to bfloat16.

    With an ``index``, int32[], w is a stack and its layer of that number is meant."""
    rows = x.shape[0]
    out, size = w.codes.shape[-1], w.block // 2
    if index is None:
        index, w = 0, jax.tree.map(lambda a: a[None], w)
    if dot:
        x = jnp.pad(x, ((0, max(16, pl.next_power_of_2(rows)) - rows), (0, 0)))
    kernel = functools.partial(_dot if dot else _sums, w.kind, size, ahead, interpret)
    parts = pl.pallas_call(
        kernel,
        grid=(out // columns, splits),
        out_shape=jax.ShapeDtypeStruct((splits, x.shape[0], out), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="product_four_bit",
    )(jnp.asarray(index, jnp.int32)[None], x, *_arrays(w))
    return jnp.sum(parts, axis=0)[:rows]


def _part(layer: Any, half: int, codes: Any, absmax: Any, nested: Any, out: Any) -> tuple[Any, ...]:
    """What one program of a product has: its columns, how many tiles, the first of them, and what loads one."""
    columns = out.shape[2] // pl.num_programs(0)
    over = pl.ds(pl.program_id(0) * columns, columns)
    count = codes.shape[1] // ROWS // pl.num_programs(1)
    begin = pl.program_id(1) * count

    def load(turn):
        at = (begin + turn) * ROWS
        return codes[layer, pl.ds(at, ROWS), over], _scale(layer, jax.lax.div(at, half), over, absmax, *nested)

    return over, count, begin, load


def _sums(kind, half, ahead, interpret, index, x, codes, absmax, *rest):
    """Each thread sums its own rows of the matrix; they meet once, at the end."""
    *nested, out = rest
    over, count, begin, load = _part(index[0], half, codes, absmax, nested, out)
    columns = over.size

    def add(turn, sums, byte, scale):
        at = (begin + turn) * ROWS
        start = at + jax.lax.div(at, half) * half
        pair = _pairs(kind, byte, interpret)
        low, high = (jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in (pair << 16, pair & -65536))
        made = []
        for i, total in enumerate(sums):
            first, second = (x[pl.ds(i, 1), pl.ds(s, ROWS)][0].astype(jnp.float32) for s in (start, start + half))
            made.append(total + (first[:, None] * high + second[:, None] * low) * scale[None])
        return tuple(made)

    def turn(t, carry):
        sums, *now = carry
        coming = load(jnp.minimum(t + 1, count - 1)) if ahead else ()
        return (add(t, sums, *(now or load(t))), *coming)

    sums = tuple(jnp.zeros((ROWS, columns), jnp.float32) for _ in range(x.shape[0]))
    sums = jax.lax.fori_loop(0, count, turn, (sums, *(load(0) if ahead else ())))[0]
    for i, total in enumerate(sums):
        out[pl.ds(pl.program_id(1), 1), pl.ds(i, 1), over] = jnp.sum(total, axis=0)[None, None]


def _dot(kind, half, ahead, interpret, index, x, codes, absmax, *rest):
    """The matrix units, a block of codes at a time, scaled after the product."""
    *nested, out = rest
    over, count, begin, load = _part(index[0], half, codes, absmax, nested, out)
    columns = over.size

    def turn(t, carry):
        total, *now = carry
        coming = load(jnp.minimum(t + 1, count - 1)) if ahead else ()
        byte, scale = now or load(t)
        at = (begin + t) * ROWS
        start = at + jax.lax.div(at, half) * half
        pair = _pairs(kind, byte, interpret)
        halves = (bits.astype(jnp.int16) for bits in (pair, pair >> 16))
        low, high = (jax.lax.bitcast_convert_type(bits, jnp.bfloat16) for bits in halves)
        made = jnp.dot(x[:, pl.ds(start, ROWS)], high, preferred_element_type=jnp.float32)
        made += jnp.dot(x[:, pl.ds(start + half, ROWS)], low, preferred_element_type=jnp.float32)
        return (total + made * scale[None], *coming)

    begun = (jnp.zeros((x.shape[0], columns), jnp.float32), *(load(0) if ahead else ()))
    out[pl.ds(pl.program_id(1), 1), :, over] = jax.lax.fori_loop(0, count, turn, begun)[0][None]


def _arrays(w: Any) -> list[jax.Array]:
    """What the kernels read of a stack [L, in, out]."""
    if w.nested is None:
        return [w.codes, w.absmax]
    return [w.codes, w.absmax, w.nested, w.offset, jnp.asarray(dynamic().values)]


def _scale(
    layer: Any, block: Any, over: Any, absmax: Any, nested: Any = None, offset: Any = None, table: Any = None
) -> Any:
    """float32[columns]: the scales of one block of rows."""
    held = absmax[layer, pl.ds(block, 1), over][0]
    if nested is None:
        return held
    at = over.start + jnp.arange(over.size, dtype=jnp.int32)
    of = plgpu.load(nested.at[layer, jax.lax.div(at * absmax.shape[1] + block, blockwise.NESTED)])
    return plgpu.load(table.at[held.astype(jnp.int32)]) * of + offset[layer]


def _numbers(kind: str, byte: jax.Array, high: bool, interpret: bool) -> jax.Array:
    """float32 of the high, or the low, four bits of each byte."""
    values = four_bit(kind).values
    if interpret:
        return blockwise.look_up(byte >> 4 if high else byte & 15, values)
    return _instructed(ptx.float32(tuple(map(float, values)), high), byte, jnp.float32)


def _pairs(kind: str, byte: jax.Array, interpret: bool) -> jax.Array:
    """int32 of each byte: the bits of bfloat16 of its low four bits below those of its high four."""
    values = four_bit(kind).values
    if interpret:
        found = (blockwise.look_up(i, values).astype(jnp.bfloat16) for i in (byte & 15, byte >> 4))
        low, high = (jax.lax.bitcast_convert_type(a, jnp.uint16).astype(jnp.int32) for a in found)
        return (high << 16) | low
    return _instructed(ptx.bfloat16_pairs(tuple(map(float, values))), byte, jnp.int32)


def _instructed(text: str, byte: jax.Array, dtype: Any) -> jax.Array:
    """What machine instructions of `ptx` make of each byte."""
    like = jax.ShapeDtypeStruct(byte.shape, dtype)
    made = plgpu.elementwise_inline_asm(
        text, args=[byte], constraints=ptx.CONSTRAINTS, pack=4, result_shape_dtypes=[like]
    )
    return made[0]
