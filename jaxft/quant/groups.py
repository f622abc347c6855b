"""Matrices of four- or eight-bit integers with a scale, and it may be a zero point, for each group of input features.

    W[i, j] = (code[i, j] - zero[g(i), j]) * scale[g(i), j]

What GPTQ, AWQ and HQQ store, and what rounding to nearest makes: without zero points (symmetric), with whole ones, or
with fractional ones as in HQQ. ``g(i) = i // size``, unless the checkpoint was made in order of activation
(``desc_act``): then any row may belong to any group.

Rows always lie in the model's own order, and such a g is looked up row by row where the matrix is made. Sorted by group
instead, each product would first permute the features of its input: more bytes than the scales of one matrix, a gather
along the axis that devices gather worst, and across devices wherever that axis is sharded. So the codes also shard
along both axes of the matrix, packed half with half within spans of at most 64 rows, as in `four_bit`.
"""

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxft.core.weight import Weight, static, weight
from jaxft.quant import packed as packed_
from jaxft.quant.dtypes import DTYPES, PackedDType

TOP = {4: 7.5, 8: 127.0}
"""Steps from zero to the largest magnitude of a symmetric group. In four bits the range ends half way between 7 and 8,
as in GPTQ's own code, so that the sixteenth code is used; in eight the largest magnitude is a code."""
SPAN = 64


@weight
class IntGroups(Weight):
    """``x @ dense``, the matrix made again wherever it is used. codes: uint8[*stack, in, out], in four bits
    uint8[*stack, in/2, out], byte j of a span holding its rows j (high bits) and j + span/2.

    scale: floating[*stack, groups, out]; zero: uint8 or floating of that shape, None for half the range (symmetric);
    group: int32[*stack, in], the group of each row, None where they follow each other in groups of one size."""

    codes: jax.Array
    scale: jax.Array
    zero: Any = None
    group: Any = None
    bits: int = static(default=4)
    span: int = static(default=SPAN)
    made_from: str = static(default="bfloat16")
    adapter: ClassVar[bool] = False
    packed: ClassVar[bool] = True
    dense_dtype = property(packed_.dense_dtype)
    nbytes = property(packed_.nbytes)
    astype, unembed, ragged_dot = packed_.astype, packed_.unembed, packed_.ragged_dot

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, out = self.codes.shape
        return (*stack, rows * 8 // self.bits, out)

    @property
    def dtype(self) -> PackedDType:
        return DTYPES[f"int{self.bits}"]

    def indices(self) -> jax.Array:
        """uint8[*stack, in, out]: the code of each number."""
        if self.bits == 8:
            return self.codes
        *stack, _, out = self.codes.shape
        byte = self.codes.reshape(*stack, -1, self.span // 2, out)
        return jnp.concatenate([byte >> 4, byte & 15], axis=-2).reshape(self.shape)

    def dense(self) -> jax.Array:
        codes, scale, zero = self.indices(), self.scale, self.zero
        if self.group is None:
            *stack, rows, out = codes.shape
            codes = codes.reshape(*stack, scale.shape[-2], rows // scale.shape[-2], out)
            scale, zero = scale[..., None, :], None if zero is None else zero[..., None, :]
        else:
            scale, zero = _rows(scale, self.group), None if zero is None else _rows(zero, self.group)
        return self._value(codes, scale, zero).reshape(self.shape)

    def _value(self, codes: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
        middle = 2.0 ** (self.bits - 1) if zero is None else zero.astype(jnp.float32)
        value = (codes.astype(jnp.float32) - middle) * scale.astype(jnp.float32)
        return packed_.rounded(value, self.dense_dtype)

    __rmatmul__ = packed_.multiply

    def take(self, ids):
        if self.bits == 8:
            codes = self.codes[ids]
        else:
            half = self.span // 2
            byte = self.codes[ids // self.span * half + ids % half]
            codes = jnp.where((ids % self.span < half)[..., None], byte >> 4, byte & 15)
        at = ids // (self.shape[-2] // self.scale.shape[-2]) if self.group is None else self.group[ids]
        return self._value(codes, self.scale[at], None if self.zero is None else self.zero[at])

    def axes(self, names):
        # a device's rows may be of any group where the groups are not in order
        of_groups = names if self.group is None else (*names[:-2], None, names[-1])
        return {"codes": names, "scale": of_groups, "zero": of_groups, "group": names[:-1]}

    def __repr__(self) -> str:
        groups, sizes = self.scale.shape[-2], ",".join(map(str, self.shape))
        how = f"{groups} groups in any order" if self.group is not None else f"groups of {self.shape[-2] // groups}"
        zero = "symmetric" if self.zero is None else f"{jnp.dtype(self.zero.dtype).name} zero points"
        return f"{type(self).__name__}({self.dtype}[{sizes}] in {how}, {zero}, made from {self.made_from})"


def _rows(a: jax.Array, index: jax.Array) -> jax.Array:
    """[*stack, groups, out], int32[*stack, in] -> [*stack, in, out]."""
    if index.ndim > 1:
        return jax.vmap(_rows)(a, index)
    return a.at[index].get(mode="promise_in_bounds")


def stored(codes: Any, scale: Any, zero: Any, group: Any, bits: int, made_from: str) -> IntGroups:
    """The weight of uint8[*stack, in, out] codes and the other fields of `IntGroups`.

    Raises ValueError for an odd number of rows in four bits."""
    *stack, rows, out = codes.shape
    span = math.gcd(rows, SPAN)
    if bits == 4:  # on the host if they are there
        if span % 2:
            raise ValueError(f"groups: got {rows} input features; expected an even number of them in four bits")
        spans = codes.reshape(*stack, -1, span, out)
        codes = ((spans[..., : span // 2, :] << 4) | spans[..., span // 2 :, :]).reshape(*stack, rows // 2, out)
    zero, group = (None if a is None else jnp.asarray(a) for a in (zero, group))
    return IntGroups(jnp.asarray(codes), jnp.asarray(scale), zero, group, bits, span, made_from)


def grid(w: jax.Array, bits: int, symmetric: bool) -> tuple[jax.Array, jax.Array]:
    """(scale float16, zero float32) [..., 1, out] for float32 groups ``w`` [..., size, out], by their extremes.

    Zero is always within the range, and scales are those that a checkpoint can hold."""
    low = jnp.minimum(jnp.min(w, axis=-2, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(w, axis=-2, keepdims=True), 0.0)
    step = jnp.maximum(-low, high) / TOP[bits] if symmetric else (high - low) / (2**bits - 1)
    least = jnp.finfo(jnp.float16).smallest_subnormal
    scale = jnp.where(step > 0, jnp.maximum(step, least.astype(jnp.float32)), 1.0).astype(jnp.float16)
    middle = jnp.full_like(low, 2.0 ** (bits - 1))
    zero = middle if symmetric else jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, 2**bits - 1)
    return scale, zero


def nearest(w: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    """The code nearest to each number, as float32."""
    return jnp.clip(jnp.round(w / scale.astype(jnp.float32)) + zero, 0, 2**bits - 1)


def size_of(rows: int, group_size: int) -> int:
    """The group size, -1 standing for all rows. Raises ValueError where it does not divide the ``rows``."""
    size = rows if group_size == -1 else group_size
    if size < 1 or rows % size:
        raise ValueError(
            f"quantize: got groups of {group_size} for {rows} input features; expected a divisor, or -1 for one group"
        )
    return size


def checked(w: Any, bits: int) -> jax.Array:
    """The array to be quantised. Raises ValueError as `packed.checked`, and for numbers beyond float16's scales."""
    w = packed_.checked(w, f"int{bits}", [f"int{b}" for b in TOP])
    if not isinstance(w, Tracer) and float(jnp.max(jnp.abs(w))) > float(jnp.finfo(jnp.float16).max):
        raise ValueError("quantize: got a number beyond 65504; expected weights whose scales float16 can hold")
    return w


def quantize(w: Any, bits: int = 4, group_size: int = 64, symmetric: bool = True) -> IntGroups:
    """``w``, a floating array [*stack, in, out], rounded to the nearest code of each group.

    Raises ValueError for an array without a matrix, bits other than 4 and 8, a group size that does not divide ``in``
    (-1: one group), and (not while tracing) numbers that are not finite or beyond float16."""
    w = checked(w, bits)
    return _quantized(w, bits, size_of(w.shape[-2], group_size), symmetric)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantized(w: jax.Array, bits: int, size: int, symmetric: bool) -> IntGroups:
    x = w.astype(jnp.float32).reshape(*w.shape[:-2], -1, size, w.shape[-1])
    scale, zero = grid(x, bits, symmetric)
    codes = nearest(x, scale, zero, bits).astype(jnp.uint8).reshape(w.shape)
    kept = None if symmetric else zero[..., 0, :].astype(jnp.uint8)
    return stored(codes, scale[..., 0, :], kept, None, bits, jnp.dtype(w.dtype).name)


def simplified(w: IntGroups) -> IntGroups:
    """The same weight without zero points that are all half the range, and without groups that are in order."""
    zero, group = w.zero, w.group
    if zero is not None and bool(jnp.all(zero == 2 ** (w.bits - 1))):
        zero = None
    rows, count = w.shape[-2], w.scale.shape[-2]
    if group is not None and rows % count == 0 and bool(jnp.all(group == jnp.arange(rows) // (rows // count))):
        group = None
    return IntGroups(w.codes, w.scale, zero, group, w.bits, w.span, w.made_from)
