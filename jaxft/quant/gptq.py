r"""GPTQ: rounding one input feature after the other, the rest of the matrix moved to make good what each rounding cost.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1. With :math:`H = \sum_t x_t x_t^\top` over inputs of
calibration and U the upper Cholesky factor of its damped inverse, :math:`H^{-1} = U^\top U`, for each row i of W:

.. math:: e_i = (W_i - Q(W_i)) / U_{ii}, \qquad W_{j} \leftarrow W_j - U_{ij} e_i \quad \text{for } j > i.

The factor 2 of the paper's H cancels, as damping is relative. Unusual: U is the inverse of the factor of H taken in
reversed order, so that H itself is never inverted; and a block of rows that is updated at once is a group, so that a
group's scales are those of its weights as they are when their turn comes.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.quant import groups
from jaxft.quant.groups import IntGroups

ROWS = 128
"""Rows in a block where scales were found beforehand."""


@dataclass(frozen=True)
class GPTQ:
    """Settings of quantisation with calibration data (quant.method=gptq)."""

    bits: int = 4
    """Of a code: 4 or 8."""
    act_order: bool = False
    """Whether input features are rounded by falling magnitude of their inputs (desc_act)."""
    static_groups: bool = False
    """With act_order: whether groups are those of neighbours, found beforehand, instead of those met in that order."""
    damping: float = 0.01
    """Added to the diagonal of the Hessian, as a share of its mean."""
    samples: int = 128
    """Rows of data.max_length tokens that the Hessians are measured on."""

    def __post_init__(self) -> None:
        for name, sound, expected in (
            ("bits", self.bits in groups.TOP, "4 or 8"),
            ("damping", 0.0 < self.damping < 1.0, "more than 0 and less than 1"),
            ("samples", self.samples >= 1, "at least 1"),
            ("static_groups", self.act_order or not self.static_groups, "false without act_order: groups are those"),
        ):
            if not sound:
                raise ValueError(f"quant.gptq.{name}: got {getattr(self, name)}; expected {expected}")


def quantize(w: jax.Array, gram: jax.Array, config: GPTQ, group_size: int, symmetric: bool = True) -> IntGroups:
    """The matrix ``w`` [in, out] in few bits, given ``gram`` float32[in, in], the sum of x x^T over its inputs.

    Raises ValueError as `groups.quantize`, and for a gram that is not finite."""
    w = groups.checked(w, config.bits)
    if not bool(jnp.all(jnp.isfinite(gram))):
        raise ValueError("gptq: got inputs that are not finite; expected a model that computes with the data given")
    size = groups.size_of(w.shape[-2], group_size)
    return _quantized(w, gram, config, size, symmetric)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantized(w: jax.Array, gram: jax.Array, config: GPTQ, size: int, symmetric: bool) -> IntGroups:
    rows, columns = w.shape
    bits, dtype = config.bits, jnp.dtype(w.dtype).name
    dead = jnp.diag(gram) == 0  # never used: anything does, so zero
    h = gram.astype(jnp.float32) + jnp.diag(jnp.where(dead, 1.0, 0.0))
    x = jnp.where(dead[:, None], 0.0, w.astype(jnp.float32))
    order = jnp.argsort(-jnp.diag(h)) if config.act_order else jnp.arange(rows)
    back = jnp.argsort(order)
    before = config.static_groups or size == rows
    scale, zero = groups.grid(x.reshape(-1, size, columns), bits, symmetric)  # [groups, 1, out]
    x, h = x[order], h[order][:, order]
    h = h + config.damping * jnp.mean(jnp.diag(h)) * jnp.eye(rows)
    if before:
        codes = _rounded(x, _factor(h), bits, (scale[:, 0][order // size], zero[:, 0][order // size]))
        scale, zero = scale[:, 0], zero[:, 0]
        of = jnp.arange(rows) // size
    else:
        codes, scale, zero = _by_groups(x, _factor(h), bits, size, symmetric)
        of = (jnp.arange(rows) // size)[back]
    group = of.astype(jnp.int32) if config.act_order and not before else None
    kept = None if symmetric else zero.astype(jnp.uint8)
    return groups.stored(codes[back], scale, kept, group, bits, dtype)


def _factor(h: jax.Array) -> jax.Array:
    """The upper U with U^T U = h^-1: of h reversed = L L^T, the reversed inverse of L."""
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)[::-1, ::-1]


def _by_groups(w: jax.Array, u: jax.Array, bits: int, size: int, symmetric: bool):
    """(codes uint8[in, out], scale float16[groups, out], zero float32[groups, out]), a group a block."""

    def block(w: jax.Array, start: jax.Array):
        own = jax.lax.dynamic_slice_in_dim(w, start, size)
        scale, zero = groups.grid(own, bits, symmetric)
        given = (jnp.broadcast_to(scale, own.shape), jnp.broadcast_to(zero, own.shape))
        w, codes = _block(w, u, start, bits, given)
        return w, (codes, scale[0], zero[0])

    _, (codes, scale, zero) = jax.lax.scan(block, w, jnp.arange(0, w.shape[0], size))
    return codes.reshape(w.shape), scale, zero


def _rounded(w: jax.Array, u: jax.Array, bits: int, given: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Codes uint8[in, out] for the scales and zero points of each row, [in, out]."""
    rows, columns = w.shape
    pad = -rows % ROWS  # rows that change nothing
    w, scale, zero = (jnp.pad(a, ((0, pad), (0, 0)), constant_values=1) for a in (w, *given))
    u = jnp.pad(u, ((0, pad), (0, pad))) + jnp.diag(jnp.pad(jnp.zeros(rows), (0, pad), constant_values=1.0))

    def block(w: jax.Array, start: jax.Array):
        own, middle = (jax.lax.dynamic_slice_in_dim(a, start, ROWS) for a in (scale, zero))
        return _block(w, u, start, bits, (own, middle))

    _, codes = jax.lax.scan(block, w, jnp.arange(0, rows + pad, ROWS))
    return codes.reshape(-1, columns)[:rows]


def _block(w: jax.Array, u: jax.Array, start: jax.Array, bits: int, given: tuple[jax.Array, jax.Array]):
    """Rounds the rows from ``start`` that ``given`` (scales and zero points) is for: (w for later rows, codes)."""
    scale, zero = given
    size = scale.shape[0]
    strip = jax.lax.dynamic_slice_in_dim(u, start, size)  # [size, in]
    corner = jax.lax.dynamic_slice_in_dim(strip, start, size, axis=1)

    def row(own: jax.Array, inputs):
        i, s, z = inputs
        now = own[i]
        code = groups.nearest(now, s, z, bits)
        error = (now - (code - z) * s.astype(jnp.float32)) / corner[i, i]
        return own - corner[i][:, None] * error, (code.astype(jnp.uint8), error)

    own = jax.lax.dynamic_slice_in_dim(w, start, size)
    _, (codes, errors) = jax.lax.scan(row, own, (jnp.arange(size), scale, zero))
    return w - jnp.matmul(strip.T, errors, precision="highest"), codes
