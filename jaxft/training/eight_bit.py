"""Adam whose two moments are kept in eight bits.

8-bit Optimizers via Block-wise Quantization, Dettmers et al. 2022, https://arxiv.org/abs/2110.02861, as
bitsandbytes has it: in every step the moments of each block of 256 numbers are unpacked, moved, and packed again,

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   update = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps),

m in the signed and v in the unsigned dynamic data type, each with its block's largest magnitude in float32. Arrays of
fewer than 4,096 numbers (in one layer) keep float32 moments.

Unlike bitsandbytes, a number whose v is zero does not move: a small v is stored as zero beside a large one of its
block, and where the next gradient is exactly zero (an embedding row not seen, an expert without tokens) m / eps would
be huge.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.quant import blockwise
from jaxft.quant.codebooks import Codebook, dynamic

SMALLEST = 4096


class Packed(NamedTuple):
    """Numbers in eight bits. codes: uint8, in their shape; scale: float32[ceil(n / 256)], of the blocks flattened."""

    codes: jax.Array
    scale: jax.Array


class Moments(NamedTuple):
    """What is kept for one array: steps taken, and the moments, each `Packed` or float32."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """The transformation of one array of one layer."""
    signed, unsigned = dynamic(True), dynamic(False)

    def init(p: jax.Array) -> Moments:
        zero = jnp.zeros(p.shape)
        return Moments(jnp.zeros((), jnp.int32), *(_stored(zero, book) for book in (signed, unsigned)))

    def update(g: jax.Array, state: Moments, params: Any = None) -> tuple[jax.Array, Moments]:
        g, count = g.astype(jnp.float32), jnp.asarray(optax.safe_increment(state.count))
        mu = b1 * _numbers(state.mu, signed) + (1 - b1) * g
        nu = b2 * _numbers(state.nu, unsigned) + (1 - b2) * g * g
        root = jnp.where(nu > 0, jnp.sqrt(nu) / jnp.sqrt(1 - b2**count) + eps, jnp.inf)
        return mu / (1 - b1**count) / root, Moments(count, _stored(mu, signed), _stored(nu, unsigned))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _stored(x: jax.Array, book: Codebook) -> Any:
    if x.size < SMALLEST:
        return x
    blocks = blockwise.blocks(x.reshape(-1))
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    codes = blockwise.indices(blocks, largest[:, None], book)
    return Packed(codes.reshape(-1)[: x.size].reshape(x.shape), largest)


def _numbers(held: Any, book: Codebook) -> jax.Array:
    if not isinstance(held, Packed):
        return held
    values = blockwise.look_up(blockwise.blocks(held.codes.reshape(-1)), book.values) * held.scale[:, None]
    return values.reshape(-1)[: held.codes.size].reshape(held.codes.shape)
