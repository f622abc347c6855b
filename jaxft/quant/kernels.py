"""Which kernel does the work of a packed matrix; where none is chosen, XLA does what the kernel would.

Chosen by what was measured on an H200 (docs/quantisation.md), and only where it was: int8 is left to XLA. A kernel runs
on one NVIDIA GPU from Ampere on, fp8 from Ada on: a program spread over several devices, whose partitioner cannot look
into it, is left to XLA as well.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import indexed
from jaxft.quant import mosaic, triton, triton_eight

FEW = {"gpu": 64, "tpu": 0}
"""Rows of ``x`` up to which the packed matrix is multiplied as it is; beyond, it is made dense first. The TPU's kernel
is compiled and compared in the tests but was never timed: it is not chosen."""

ADDRESSED = 2**31
"""Bytes that a kernel's 32-bit offsets reach."""

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""What the largest number of a row becomes in eight bits."""


@functools.cache
def available(capability: float = 8.0) -> bool:
    """Whether kernels that need that compute capability run here: Ampere's 8.0, for fp8 Ada's 8.9."""
    devices = jax.local_devices()
    has = str(getattr(devices[0], "compute_capability", ""))  # of an AMD GPU, a name
    alone = len(devices) == jax.device_count() == 1
    return alone and re.fullmatch(r"\d+\.\d+", has) is not None and float(has) >= capability


def fits(w: Any, stacked: bool = False) -> bool:
    """Whether the kernels run here and have tiles for this weight, or for the layers of a stack [L, in, out]."""
    tiled = w.codes.ndim == 2 + stacked and w.codes.shape[-2] % triton.ROWS == 0 and w.block // 2 >= triton.ROWS
    return available() and tiled and _columns(w) > 0 and w.codes.size < ADDRESSED


def _columns(w: Any) -> int:
    return next((n for n in (128, 64, 32) if w.codes.shape[-1] % n == 0), 0)


def dense(w: Any) -> jax.Array:
    """`FourBit.dense`."""
    run = functools.partial(triton.dense, columns=_columns(w))
    return jax.lax.platform_dependent(w, cuda=run, default=lambda w: w.remade())


def few(x: jax.Array, w: Any, stacked: bool = False) -> bool:
    """Whether `product` is for this product, or `product_at`."""
    backend = jax.default_backend()
    if x.dtype != jnp.bfloat16 or not 0 < math.prod(x.shape[:-1]) <= FEW.get(backend, 0):
        return False
    return fits(w, stacked) if backend == "gpu" else not stacked and jax.device_count() == 1 and mosaic.fits(w)


@jax.custom_vjp
def product(x: jax.Array, w: Any) -> jax.Array:
    """``x @ w`` for few rows, x bfloat16[..., in]; its gradient by the dense matrix."""

    return _over_rows(x, w, None)


def product_at(x: jax.Array, w: Any, index: jax.Array) -> jax.Array:
    """``x @ w[index]`` for few rows and a stack w [L, in, out], without a gradient."""
    return _over_rows(x, w, index)


def _over_rows(x: jax.Array, w: Any, index: Any) -> jax.Array:
    made = _rows(x.reshape(-1, x.shape[-1]), w, index)
    return made.reshape(*x.shape[:-1], -1)


@jax.custom_batching.custom_vmap
def _rows(x: jax.Array, w: Any, index: Any) -> jax.Array:
    """``x @ w``, or of a stack ``x @ w[index]``: bfloat16[rows, in] -> bfloat16[rows, out]."""
    on_a_tpu = jax.default_backend() == "tpu"
    chosen = {"tpu" if on_a_tpu else "cuda": _on_a_tpu if on_a_tpu else _on_a_gpu}
    return jax.lax.platform_dependent(x, w, index, default=_by_xla, **chosen)


@_rows.def_vmap
def _mapped(size: int, batched: Any, x: jax.Array, w: Any, index: Any) -> tuple[jax.Array, bool]:
    """Rows of several callers on one matrix are more rows: the matrix is read once."""
    if any(jax.tree.leaves(batched[1:])):
        axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
        return jax.vmap(_by_xla, axes, axis_size=size)(x, w, index), True
    flat = x.reshape(-1, x.shape[-1])
    run = _rows if flat.shape[0] <= FEW.get(jax.default_backend(), 0) else _by_xla
    return run(flat, w, index).reshape(size, x.shape[1], -1), True


def _by_xla(x: jax.Array, w: Any, index: Any) -> jax.Array:
    w = w if index is None else indexed.alone(w, index)
    return x @ w.dense().astype(x.dtype)


def _on_a_tpu(x: jax.Array, w: Any, index: Any) -> jax.Array:
    return mosaic.product(x, w).astype(x.dtype)


def _on_a_gpu(x: jax.Array, w: Any, index: Any) -> jax.Array:
    return triton.product(x, w, index, **_tiling(x.shape[0], w)).astype(x.dtype)


def _forward(x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return product(x, w), w


def _backward(w: Any, g: jax.Array) -> tuple[jax.Array, None]:
    return g @ dense(w).astype(g.dtype).T, None


product.defvjp(_forward, _backward)


def _tiling(rows: int, w: Any) -> dict[str, Any]:
    """How the product is divided: what was fastest for so many rows.

    ``splits``: parts of the inner dimension summed apart, so that there are programs for all multiprocessors."""
    columns, warps, programs = _columns(w), 4, 1024
    if 2 < rows <= 32:
        warps, programs = 2, 512
    elif rows > 32:
        columns = min(columns, 64)
    tiles, steps = w.codes.shape[-1] // columns, w.codes.shape[-2] // triton.ROWS
    splits = max((s for s in (1, 2, 4, 8, 16, 32) if steps % s == 0 and tiles * s <= programs), default=1)
    return {"columns": columns, "splits": splits, "warps": warps, "dot": rows > 2, "ahead": rows > 32}


def eight_bits(w: Any, over: jax.Array, dtype: Any, transposed: bool) -> jax.Array:
    """The matrix divided by ``over`` float32[out] in int8 or fp8, [in, out] or [out, in]; see `triton.eight_bits`."""

    def plain(w: Any, over: jax.Array) -> jax.Array:
        made = w.numbers() / over
        made = (jnp.round(made) if dtype == jnp.int8 else made).astype(dtype)
        return made.T if transposed else made

    if not fits(w) or not _fp8(dtype):
        return plain(w, over)

    def run(w: Any, over: jax.Array) -> jax.Array:
        return triton.eight_bits(w, over, dtype, transposed, _columns(w))

    return jax.lax.platform_dependent(w, over, cuda=run, default=plain)


def _fp8(dtype: Any) -> bool:
    return available(8.9) and dtype == jnp.float8_e4m3fn


def rounded(x: jax.Array, by: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Rows of x [..., n], times ``by`` float32[n] or None, in int8 or fp8: codes [..., n], and what they are over,
    float32[..., 1]."""
    most = LARGEST[jnp.dtype(dtype).name]

    def plain(x: jax.Array, by: Any) -> tuple[jax.Array, jax.Array]:
        return scaled(x.astype(jnp.float32) * (1.0 if by is None else by), -1, dtype)

    if not _fp8(dtype) or x.shape[-1] > triton_eight.WIDEST or x.dtype != jnp.bfloat16 or x.size == 0:
        return plain(x, by)

    def run(x: jax.Array, by: Any) -> tuple[jax.Array, jax.Array]:
        codes, over = triton_eight.rounded(x.reshape(-1, x.shape[-1]), by, dtype, most)
        return codes.reshape(x.shape), over.reshape(*x.shape[:-1], 1)

    return jax.lax.platform_dependent(x, by, cuda=run, default=plain)


def scaled(x: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(codes, scales float32) such that codes times scales is near x, float32; one scale along ``axis``."""
    most = LARGEST[jnp.dtype(dtype).name]
    scale = scale_of(jnp.max(jnp.abs(x), axis=axis, keepdims=True), most)
    codes = jnp.clip(x / scale, -most, most)
    return (jnp.round(codes) if dtype == jnp.int8 else codes).astype(dtype), scale


def scale_of(largest: jax.Array, most: float) -> jax.Array:
    """What makes the largest number ``most`` in eight bits, like ``largest``: not finite where that is not."""
    return jnp.where(largest < triton_eight.SMALLEST, 1.0, largest / most)


def finished(product: jax.Array, rows: jax.Array, columns: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """``product * rows * columns + u @ v`` in the dtype of u, [..., n].

    rows: float32[..., 1]; columns: float32[n]; u: [..., r]; v: [r, n]."""

    def plain(product, rows, columns, u, v):
        return (product.astype(jnp.float32) * rows * columns).astype(u.dtype) + u @ v

    (high, wide), rank = triton_eight.TILE, u.shape[-1]
    count = product.size // product.shape[-1]
    whole = count > 0 and count % high == 0 and product.shape[-1] % wide == 0 and rank in (16, 32, 64, 128)
    if not available() or not whole or u.dtype != jnp.bfloat16 or product.dtype != jnp.bfloat16:
        return plain(product, rows, columns, u, v)

    def run(product, rows, columns, u, v):
        flat, scale = product.reshape(count, -1), rows.reshape(count, 1)
        return triton_eight.finished(flat, scale, columns, u.reshape(count, rank), v).reshape(product.shape)

    return jax.lax.platform_dependent(product, rows, columns, u, v, cuda=run, default=plain)
