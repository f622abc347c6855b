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
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.core.weight import Weight, static, weight
from jaxft.quant import kernels
from jaxft.quant import packed as packed_
from jaxft.quant.dtypes import DTYPES, PackedDType

CODES: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
LARGEST = {kind: kernels.LARGEST[dtype.name] for kind, dtype in CODES.items()}


class Parts(NamedTuple):
    """Of a product ``x @ w`` in eight bits: the codes and the axis of them that meets the features of ``x``, and the
    float32 vectors, or None, by which the features are multiplied before and after."""

    codes: jax.Array
    axis: int
    before: Any
    after: Any


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
        return product(x, self)

    def plus(self, x, u, v):
        return super().plus(x, u, v) if self.exact else product(x, self, (u, v))

    def eight_bits(self, forward: bool) -> Parts:
        """What `product` multiplies by, forwards or (for the gradient) backwards."""
        return Parts(self.codes, 0, self.rows, self.scale) if forward else Parts(self.codes, 1, self.scale, self.rows)

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
    codes, scale = kernels.scaled(x, -2, CODES[kind])
    return EightBit(codes, scale[..., 0, :], kind, exact, jnp.dtype(w.dtype).name, rows)


def _smaller(x: jax.Array) -> jax.Array:
    """The power of two, from 1/4 down, that each row of ``x`` [*stack, in, out] is of the usual one; 1 for others."""
    largest = jnp.max(jnp.abs(x), axis=-1)
    ratio = largest / jnp.median(largest, axis=-1, keepdims=True)
    power = jnp.round(jnp.log2(jnp.where((ratio > 0) & jnp.isfinite(ratio), ratio, 1.0)))
    return jnp.where(power <= -2, jnp.exp2(power), 1.0)


def _multiply(x: jax.Array, by: Parts) -> tuple[jax.Array, jax.Array]:
    """The product of the codes of ``x`` [..., n] with those of the weight, and what scales its rows: float32[..., 1].

    The sums of int8 are exact in int32; those of fp8 leave the product in the dtype of ``x``, whose rounding is less
    than that of the codes, and which is half as much to write; but not in float16, which ends before a product of two
    of the codes does."""
    rows, scale = kernels.rounded(x, by.before, by.codes.dtype)
    wide = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    out = jnp.int32 if by.codes.dtype == jnp.int8 else wide
    contract = (((x.ndim - 1,), (by.axis,)), ((), ()))
    return jax.lax.dot_general(rows, by.codes, contract, preferred_element_type=out), scale


Low = tuple[jax.Array, jax.Array] | None


@jax.custom_vjp
def product(x: jax.Array, w: Any, low: Low = None) -> jax.Array:
    """``x @ w`` in eight bits, [..., in] -> [..., out], for a weight [in, out] with the method ``eight_bits``; plus
    ``u @ v`` for ``low`` = (u [..., r], v [r, out]), both in the dtype of x."""
    by = w.eight_bits(True)
    made, rows = _multiply(x, by)
    return _scaled(made, rows, by.after, x.dtype) if low is None else kernels.finished(made, rows, by.after, *low)


def _scaled(made: jax.Array, rows: jax.Array, columns: Any, dtype: Any) -> jax.Array:
    made = made.astype(jnp.float32) * rows
    return (made if columns is None else made * columns).astype(dtype)


def _forward(x: jax.Array, w: Any, low: Low) -> tuple[jax.Array, tuple[Any, Low]]:
    return product(x, w, low), (w, low)


def _backward(kept: tuple[Any, Low], g: jax.Array) -> tuple[jax.Array, None, Low]:
    w, low = kept
    by = w.eight_bits(False)
    made, rows = _multiply(g, by)
    return _scaled(made, rows, by.after, g.dtype), None, None if low is None else jax.vjp(jnp.matmul, *low)[1](g)


product.defvjp(_forward, _backward)
