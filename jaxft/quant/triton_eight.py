"""Kernels around a product in eight bits on NVIDIA GPUs, in Pallas: what goes in is rounded, what comes out scaled.

Each reads its array once, where XLA reads activations twice (for the largest number, then to round), and writes the
scaled product before it adds an adapter's to it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

WIDEST = 32768
"""Features of a row that fit into the registers of one program."""
TILE = (64, 128)
SMALLEST = 1e-35
"""Rows of smaller numbers become zeros: the inverse of their scale, or the scale itself, is beyond float32."""


def rounded(x: jax.Array, by: Any, dtype: Any, most: float, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Each row of x [rows, n], times ``by`` [n] (or None), in int8 or fp8 over a scale of its own: codes [rows, n], and
    float32[rows, 1]. The largest number of a row becomes ``most``."""
    rows, n = x.shape
    width = pl.next_power_of_2(n)
    return pl.pallas_call(
        functools.partial(_rounded, n, width, most, by is not None),
        grid=(rows,),
        out_shape=(jax.ShapeDtypeStruct((rows, n), dtype), jax.ShapeDtypeStruct((rows, 1), jnp.float32)),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(16, width // 1024))),
        interpret=interpret,
        name="rows_to_eight_bits",
    )(x, *(() if by is None else (by,)))


def _rounded(n, width, most, scaled, x, *rest):
    *by, codes, scale = rest
    row, at = pl.ds(pl.program_id(0), 1), pl.ds(0, width)
    inside = (jnp.arange(width) < n)[None]
    held = plgpu.load(x.at[row, at], mask=inside, other=0.0).astype(jnp.float32)
    if scaled:
        held *= plgpu.load(by[0].at[at], mask=inside[0], other=0.0).astype(jnp.float32)[None]
    largest = jnp.max(jnp.abs(held), axis=1, keepdims=True)
    over = jnp.where(largest < SMALLEST, most, largest)
    made = held * (most / over)
    if codes.dtype == jnp.int8:
        made = jnp.floor(made + 0.5)
    plgpu.store(codes.at[row, at], made.astype(codes.dtype), mask=inside)
    scale[row, pl.ds(0, 1)] = over / most


def finished(
    product: jax.Array, rows: jax.Array, columns: jax.Array, u: jax.Array, v: jax.Array, interpret: bool = False
) -> jax.Array:
    """``product * rows * columns + u @ v`` in the dtype of u: [m, n], float32[m, 1], float32[n], [m, r], [r, n]."""
    (m, n), (high, wide) = product.shape, TILE
    return pl.pallas_call(
        _finished,
        grid=(m // high, n // wide),
        out_shape=jax.ShapeDtypeStruct((m, n), u.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="scale_and_add",
    )(product, rows, columns, u, v)


def _finished(product, rows, columns, u, v, out):
    high, wide = TILE
    down, across = pl.ds(pl.program_id(0) * high, high), pl.ds(pl.program_id(1) * wide, wide)
    added = jnp.dot(u[down, :], v[:, across], preferred_element_type=jnp.float32)
    made = product[down, across].astype(jnp.float32) * rows[down, pl.ds(0, 1)] * columns[across][None]
    out[down, across] = (made + added).astype(out.dtype)
