"""Which kernel makes, or multiplies by, a four-bit matrix; where none is chosen, XLA does what the kernel would.

Chosen by what was measured on an H200, docs/quantisation.md. A kernel runs on one NVIDIA GPU from Ampere on: a program
spread over several devices, whose partitioner cannot look into it, is left to XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.quant import triton

FEW = 16
"""Rows of ``x`` up to which the packed matrix is multiplied as it is; beyond, it is made dense first."""


@functools.cache
def available() -> bool:
    """Whether the kernels run here."""
    devices = jax.local_devices()
    capability = getattr(devices[0], "compute_capability", None)
    return len(devices) == jax.device_count() == 1 and capability is not None and float(capability) >= 8.0


def fits(w: Any) -> bool:
    """Whether the kernels run here and have tiles for this weight."""
    return available() and w.codes.ndim == 2 and w.codes.shape[0] % triton.ROWS == 0 and w.block >= 64 and _columns(w) > 0


def _columns(w: Any) -> int:
    return next((n for n in (128, 64, 32) if w.codes.shape[1] % n == 0), 0)


def dense(w: Any) -> jax.Array:
    """`FourBit.dense`."""
    run = functools.partial(triton.dense, columns=_columns(w))
    return jax.lax.platform_dependent(w, cuda=run, default=lambda w: w.remade())


def few(x: jax.Array, w: Any) -> bool:
    """Whether `product` is for this product."""
    rows = x.size // x.shape[-1]
    return fits(w) and rows <= FEW and x.dtype == jnp.bfloat16


@jax.custom_vjp
def product(x: jax.Array, w: Any) -> jax.Array:
    """``x @ w`` for few rows, x bfloat16[..., in]; its gradient by the dense matrix."""

    def run(x: jax.Array, w: Any) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        made = triton.product(rows, w, _columns(w), _splits(w), dot=rows.shape[0] > 2)
        return made.astype(x.dtype).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, w, cuda=run, default=lambda x, w: x @ w.remade().astype(x.dtype))


def _forward(x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return product(x, w), w


def _backward(w: Any, g: jax.Array) -> tuple[jax.Array, None]:
    return g @ dense(w).astype(g.dtype).T, None


product.defvjp(_forward, _backward)


def _splits(w: Any) -> int:
    """Parts of the inner dimension summed apart, so that there are programs for all multiprocessors."""
    tiles, steps = w.codes.shape[1] // _columns(w), w.codes.shape[0] // triton.ROWS
    return max((s for s in (1, 2, 4, 8, 16, 32) if steps % s == 0 and tiles * s <= 1024), default=1)


def eight_bits(w: Any, over: jax.Array, dtype: Any, transposed: bool) -> jax.Array:
    """The matrix divided by ``over`` float32[out] in int8 or fp8, [in, out] or [out, in]; see `triton.eight_bits`."""

    def plain(w: Any, over: jax.Array) -> jax.Array:
        made = w.numbers() / over
        made = (jnp.round(made) if dtype == jnp.int8 else made).astype(dtype)
        return made.T if transposed else made

    if not fits(w):
        return plain(w, over)

    def run(w: Any, over: jax.Array) -> jax.Array:
        return triton.eight_bits(w, over, dtype, transposed, _columns(w))

    return jax.lax.platform_dependent(w, over, cuda=run, default=plain)
