"""Matrices in eight bits with a scale for each output, and products in eight bits: int8 and fp8 (e4m3).

As the base never changes, it is rounded once; activations are scaled by row on the fly:

    x @ W ~ (s_x q_x) @ (q_w s_w),   s_w = max |W[:, j]| / m,   s_x = max |x[i]| / m,   m = 127 (int8) or 448 (fp8)

LLM.int8(), Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2.1, without its outlier columns. The
gradient with respect to x is made alike, of the rows of ``g s_w``: the same codes serve both directions.

An input feature much larger than the others leaves them few of the steps, and its weights, where they are as much
smaller than the others, get few themselves. With ``equalise`` a row of W at least four times smaller than the usual one
is made as large, and x smaller: SmoothQuant's migration (Xiao et al. 2022, https://arxiv.org/abs/2211.10438, eqs. 3 and
4) with alpha = 0, which asks for no data, by powers of two, which round nothing. No feature of x is made larger.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxft.core.weight import Weight, static, weight
from jaxft.quant import packed as packed_
from jaxft.quant.dtypes import DTYPES, PackedDType

CODES: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
LARGEST = {"int8": 127.0, "fp8": 448.0}


@weight
class EightBit(Weight):
    """codes: int8 or float8_e4m3fn[*stack, in, out]; scale: float32[*stack, out]; rows: float32[*stack, in], by which
    ``x`` is multiplied, or None.

    ``exact``: whether ``x @ w`` is the product with `dense` in the dtype of ``x`` instead of one in eight bits."""

    codes: jax.Array
    scale: jax.Array
    kind: str = static(default="int8")
    exact: bool = static(default=False)
    made_from: str = static(default="bfloat16")
    rows: Any = None
    adapter: ClassVar[bool] = False
    packed: ClassVar[bool] = True
    dense_dtype = property(packed_.dense_dtype)
    nbytes = property(packed_.nbytes)
    astype, unembed, ragged_dot = packed_.astype, packed_.unembed, packed_.ragged_dot

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> PackedDType:
        return DTYPES[self.kind]

    def dense(self) -> jax.Array:
        values = self.codes.astype(jnp.float32) * self.scale[..., None, :]
        return (values if self.rows is None else values * self.rows[..., None]).astype(self.dense_dtype)

    def __rmatmul__(self, x):
        if self.exact:
            return packed_.multiply(self, x)
        x = x if self.rows is None else x * self.rows.astype(x.dtype)
        return product(x, self)

    def eight_bits(self, forward: bool) -> tuple[jax.Array, int, jax.Array]:
        """The codes, the axis of them over which ``x`` is summed forwards, the output's gradient backwards, and scale."""
        return self.codes, 0 if forward else 1, self.scale

    def repacked(self, w: Any) -> "EightBit":
        """Another floating array stored as this one is."""
        return dataclasses.replace(quantize(w, self.kind, self.exact, self.rows is not None), made_from=self.made_from)

    def take(self, ids):
        values = self.codes[ids].astype(jnp.float32) * self.scale
        return (values if self.rows is None else values * self.rows[ids][..., None]).astype(self.dense_dtype)

    def axes(self, names):
        fields = {"codes": names, "scale": (*names[:-2], names[-1])}
        return fields if self.rows is None else fields | {"rows": names[:-1]}

    def __repr__(self) -> str:
        return f"EightBit({self.kind}[{','.join(map(str, self.shape))}] by output, made from {self.made_from})"


def quantize(w: Any, kind: str = "int8", exact: bool = False, equalise: bool = False) -> EightBit:
    """The eight-bit form of ``w``, a floating array [*stack, in, out]; with ``equalise`` its rows are made alike first.

    Raises ValueError for an array without a matrix, another kind, and (not while tracing) numbers not finite."""
    w = packed_.checked(w, kind, CODES)
    x, rows = w.astype(jnp.float32), None
    if equalise:
        rows = _smaller(x)
        x = x / rows[..., None]
    codes, scale = _scaled(x, -2, CODES[kind])
    return EightBit(codes, scale[..., 0, :], kind, exact, jnp.dtype(w.dtype).name, rows)


def _smaller(x: jax.Array) -> jax.Array:
    """The power of two, from 1/4 down, that each row of ``x`` [*stack, in, out] is of the usual one; 1 for others."""
    largest = jnp.max(jnp.abs(x), axis=-1)
    ratio = largest / jnp.median(largest, axis=-1, keepdims=True)
    power = jnp.round(jnp.log2(jnp.where((ratio > 0) & jnp.isfinite(ratio), ratio, 1.0)))
    return jnp.where(power <= -2, jnp.exp2(power), 1.0)


def _scaled(x: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) such that codes times scales is near x; one scale along ``axis``."""
    most = LARGEST["int8" if dtype == jnp.int8 else "fp8"]
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / most, 1.0)
    codes = jnp.clip(x.astype(jnp.float32) / scale, -most, most)
    return (jnp.round(codes) if dtype == jnp.int8 else codes).astype(dtype), scale


def _multiply(x: jax.Array, codes: jax.Array, axis: int) -> jax.Array:
    """float32: ``x`` [..., n] in eight bits times ``codes``, contracted over their ``axis``; scaled back by row.

    The sums of int8 are exact in int32; those of fp8 leave the product in the dtype of ``x``, whose rounding is less than
    that of the codes, and which is half as much to write."""
    rows, scale = _scaled(x, -1, codes.dtype)
    out = jnp.int32 if codes.dtype == jnp.int8 else x.dtype
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(rows, codes, contract, preferred_element_type=out).astype(jnp.float32) * scale


@jax.custom_vjp
def product(x: jax.Array, w: Any) -> jax.Array:
    """``x @ w`` in eight bits, [..., in] -> [..., out], for a weight [in, out] with the method ``eight_bits``."""
    codes, axis, scale = w.eight_bits(True)
    return (_multiply(x, codes, axis) * scale).astype(x.dtype)


def _forward(x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return product(x, w), w


def _backward(w: Any, g: jax.Array) -> tuple[jax.Array, None]:
    codes, axis, scale = w.eight_bits(False)
    return _multiply(g * scale.astype(g.dtype), codes, axis).astype(g.dtype), None


product.defvjp(_forward, _backward)
