"""Matrices of four-bit codes with a scale for each block, NF4 and FP4: equal to bitsandbytes' to the bit.

Blocks run along the input features, as in torch's ``[out, in]`` flattened. Where bitsandbytes packs neighbours into a
byte, here the first half of a block is packed with its second: unpacking needs no interleaving, and the codes can be
sharded along both axes of the matrix. `bitsandbytes` gives and takes the other order.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxft.core import indexed
from jaxft.core.weight import Weight, static, weight
from jaxft.quant import blockwise, eight_bit, kernels
from jaxft.quant import packed as packed_
from jaxft.quant.codebooks import four_bit
from jaxft.quant.dtypes import DTYPES, PackedDType

KINDS = ("nf4", "fp4")


@weight
class FourBit(Weight):
    """``x @ dense``, the matrix made again wherever it is used. codes: uint8[*stack, in/2, out], byte j of a block
    holding its elements j (high bits) and j + block/2.

    absmax: float32[*stack, in/block, out], or with double quantisation uint8, scaled by nested: float32[*stack, n/256]
    (n blocks of a matrix, in the order of ``[out, in/block]``) and moved by offset: float32[*stack].

    ``compute``: exact, the product with `dense`; int8 or fp8, one in eight bits, as `EightBit` multiplies."""

    codes: jax.Array
    absmax: jax.Array
    nested: Any = None
    offset: Any = None
    kind: str = static(default="nf4")
    block: int = static(default=64)
    made_from: str = static(default="bfloat16")
    compute: str = static(default="exact")
    adapter: ClassVar[bool] = False
    packed: ClassVar[bool] = True
    dense_dtype = property(packed_.dense_dtype)
    nbytes = property(packed_.nbytes)
    astype, unembed, ragged_dot = packed_.astype, packed_.unembed, packed_.ragged_dot

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, half, out = self.codes.shape
        return (*stack, 2 * half, out)

    @property
    def dtype(self) -> PackedDType:
        return DTYPES[self.kind]

    def scales(self) -> jax.Array:
        """float32[*stack, in/block, out]: the largest magnitude of each block."""
        if self.nested is None:
            return self.absmax
        flat = jnp.swapaxes(self.absmax, -1, -2)
        made = blockwise.unnest(flat.reshape(*flat.shape[:-2], -1), self.nested, self.offset)
        return jnp.swapaxes(made.reshape(flat.shape), -1, -2)

    def dense(self) -> jax.Array:
        return kernels.dense(self) if kernels.fits(self) else self.remade()

    def remade(self) -> jax.Array:
        """`dense`, by XLA."""
        return packed_.rounded(self.numbers(), self.dense_dtype)

    def numbers(self) -> jax.Array:
        """float32[*stack, in, out]: what the codes and scales stand for."""
        half = self.block // 2
        *stack, packed, out = self.codes.shape
        codes = self.codes.reshape(*stack, packed // half, half, out)
        values = blockwise.look_up(jnp.concatenate([codes >> 4, codes & 15], axis=-2), four_bit(self.kind).values)
        return (values * self.scales()[..., :, None, :]).reshape(self.shape)

    @property
    def in_place(self) -> bool:
        return self.compute == "exact" and kernels.fits(self, stacked=True)

    def product_at(self, x: jax.Array, index: Any) -> jax.Array:
        """``x @ self[index]`` of a stack, for passes without a gradient."""
        if kernels.few(x, self, stacked=True):
            return kernels.product_at(x, self, index)
        return x @ indexed.alone(self, index)

    def __rmatmul__(self, x):
        if self.compute != "exact":
            return eight_bit.product(x, self)
        return kernels.product(x, self) if kernels.few(x, self) else packed_.multiply(self, x)

    def plus(self, x, u, v):
        return super().plus(x, u, v) if self.compute == "exact" else eight_bit.product(x, self, (u, v))

    def eight_bits(self, forward: bool) -> eight_bit.Parts:
        """What `eight_bit.product` multiplies by, forwards or (for the gradient) backwards: made each time."""
        largest = jnp.max(jnp.abs(self.scales()), axis=-2)  # every block has a number as large as its scale
        scale = kernels.scale_of(largest, eight_bit.LARGEST[self.compute])
        codes = kernels.eight_bits(self, scale, eight_bit.CODES[self.compute], transposed=forward)
        return eight_bit.Parts(codes, 1, None, scale) if forward else eight_bit.Parts(codes, 1, scale, None)

    def repacked(self, w: Any) -> "FourBit":
        """Another floating array stored as this one is."""
        made = quantize(w, self.kind, self.block, self.nested is not None, self.compute)
        return dataclasses.replace(made, made_from=self.made_from)

    def take(self, ids):
        half = self.block // 2
        row = ids // self.block * half + ids % half
        byte = self.codes[row]
        code = jnp.where((ids % self.block < half)[..., None], byte >> 4, byte & 15)
        values = blockwise.look_up(code, four_bit(self.kind).values) * self.scales()[ids // self.block]
        return packed_.rounded(values, self.dense_dtype)

    def axes(self, names):
        fields = {"codes": names, "absmax": names}
        return fields if self.nested is None else fields | {"nested": (*names[:-2], None), "offset": names[:-2]}

    def __repr__(self) -> str:
        more = "" if self.nested is None else ", double quantised"
        more += "" if self.compute == "exact" else f", multiplied in {self.compute}"
        sizes = ",".join(map(str, self.shape))
        return (
            f"{type(self).__name__}({self.kind}[{sizes}] in blocks of {self.block}{more}, made from {self.made_from})"
        )


def quantize(
    w: Any, kind: str = "nf4", block_size: int = 64, double_quant: bool = True, compute: str = "exact"
) -> FourBit:
    """The four-bit form of ``w``, a floating array [*stack, in, out].

    Raises ValueError for an array without a matrix, a block size that does not divide ``in`` or is not one of
    32, 64, ... 4096, and (not while tracing) for numbers that are not finite."""
    w = packed_.checked(w, kind, KINDS)
    if compute not in ("exact", *eight_bit.CODES):
        raise ValueError(f"quantize: got compute {compute!r}; expected one of exact, {', '.join(eight_bit.CODES)}")
    if block_size < 32 or block_size > 4096 or block_size & (block_size - 1):
        raise ValueError(f"quantize: got block_size {block_size}; expected a power of two from 32 to 4096")
    if w.shape[-2] % block_size:
        fits = math.gcd(w.shape[-2], 4096)
        remedy = f"Use one of at most {fits}, or leave the weight as it is." if fits >= 32 else "Leave it as it is."
        raise ValueError(
            f"quantize: got block_size {block_size} for {list(w.shape)}; expected a divisor of its "
            f"{w.shape[-2]} input features. {remedy}"
        )
    made = _made(w, kind, block_size, double_quant)
    return made if compute == "exact" else dataclasses.replace(made, compute=compute)


def _pack(index: jax.Array) -> jax.Array:
    """uint8[*stack, in/block, block, out] of indices -> bytes [*stack, in/2, out]."""
    high, low = jnp.split(index, 2, axis=-2)
    return ((high << 4) | low).reshape(*index.shape[:-3], -1, index.shape[-1])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _made(w: jax.Array, kind: str, block: int, double: bool) -> FourBit:
    x = w.astype(jnp.float32).reshape(*w.shape[:-2], -1, block, w.shape[-1])
    absmax = jnp.max(jnp.abs(x), axis=-2)
    codes = _pack(blockwise.indices(x, absmax[..., None, :], four_bit(kind)))
    made = FourBit(codes, absmax, kind=kind, block=block, made_from=jnp.dtype(w.dtype).name)
    return nest(made) if double else made


def nest(w: FourBit) -> FourBit:
    """The same codes with the scales quantised as well."""
    flat = jnp.swapaxes(w.absmax, -1, -2)
    codes, nested, offset = blockwise.nest(flat.reshape(*flat.shape[:-2], -1))
    absmax = jnp.swapaxes(codes.reshape(flat.shape), -1, -2)
    return FourBit(w.codes, absmax, nested, offset, w.kind, w.block, w.made_from)
