r"""How LoRA's factors begin: drawn at random, or taken out of the matrix they adapt.

Drawn, with a product of zero (but for ``random``, peft's init_lora_weights=False):

- kaiming: A uniform within 1/sqrt(in), B zero; gaussian: A normal with deviation 1/r, B zero; a_zero: A zero, B uniform
  within 1/sqrt(r); random: both uniform; an embedding's A is zero and its B standard normal.
- orthogonal (datta0.github.io/posts/rethink-lora-init): the rows of an orthogonal r x r matrix are dealt to two sides,
  :math:`A = N_A Q_{odd} / 10`, :math:`B = Q_{even}^\top N_B / 10`, N normal: A B = 0, though neither is zero.

Taken out of :math:`W = U S V^\top`, so that :math:`s A_0 B_0` is the part of W that trains:

- pissa: the largest r singular values, :math:`A = U_r (S_r/s)^{1/2}`, :math:`B = (S_r/s)^{1/2} V_r^\top` (Meng et al.
  2024, eqs. 2 to 4, arXiv:2404.02948), by an exact decomposition or a randomised one (Halko et al. 2011, alg. 4.4).
- olora: :math:`W^\top = Q R`, :math:`B = Q_r^\top`, :math:`A = R_r^\top` (Büyükakyüz 2024, arXiv:2406.01775).
- loftq: W is quantised too, Q and A B by turns: :math:`Q \leftarrow q(W - s A B)`, :math:`s A B \leftarrow
  \mathrm{svd}_r(W - Q)` (Li et al. 2023, alg. 1, arXiv:2310.08659). Q takes the place of W for good.
- qpissa: likewise, but A B begins as pissa's and Q comes last: :math:`s A B \leftarrow \mathrm{svd}_r(W)`,
  :math:`Q \leftarrow q(W - s A B)`, and for more turns :math:`s A B \leftarrow \mathrm{svd}_r(W - Q)` again (Meng et
  al. 2024, section 4 and alg. 1).

On a base in few bits Q is stored as that base is, and W is read from where it was read, a layer at a time. The first Q
of loftq is the base that is there already: after one turn the base is shared and the adapter an ordinary one.
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import verbs
from jaxft.core.weight import Weight
from jaxft.peft.sites import Site

Pair = tuple[jax.Array, jax.Array]
"""A [in, r] and B [r, out] of one layer; of a stack, [*stack, in, R] and [*stack, R, out]."""


@dataclass(frozen=True)
class LoftQ:
    """Settings of the loftq initialisation."""

    bits: Literal[2, 4, 8] | None = None
    """Bits of the simulated normal-float quantiser; default: 4. A base that is stored in few bits has its own."""
    iterations: int = 1
    """Turns of quantising and decomposing."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"peft.loftq.iterations: got {self.iterations}; expected at least 1")


def drawn(key: jax.Array, shape: tuple[int, ...], ranks: np.ndarray, how: str) -> Pair:
    """Random factors of a whole stack, zero beyond each layer's rank; ``ranks`` int[*stack]."""
    *stack, rows, columns = shape
    width = int(ranks.max())
    real = jnp.arange(width) < ranks[..., None]  # bool[*stack, R]
    a_shape, b_shape = (*stack, rows, width), (*stack, width, columns)
    divisor = jnp.maximum(jnp.asarray(ranks, jnp.float32), 1.0)[..., None, None]
    a, b = jnp.zeros(a_shape), jnp.zeros(b_shape)
    if how in ("kaiming", "random"):
        a = jax.random.uniform(key, a_shape, minval=-1.0, maxval=1.0) / np.sqrt(rows)
    elif how == "gaussian":
        a = jax.random.normal(key, a_shape) / divisor
    if how in ("a_zero", "random"):
        b = jax.random.uniform(jax.random.fold_in(key, 1), b_shape, minval=-1.0, maxval=1.0) / jnp.sqrt(divisor)
    elif how == "embedding":
        b = jax.random.normal(key, b_shape)
    return jnp.where(real[..., None, :], a, 0.0), jnp.where(real[..., None], b, 0.0)


def by_layer(site: Site, fn: Callable[[tuple[int, ...], jax.Array], Any]) -> Any:
    """``fn(index, key)`` of each layer, stacked like the base.

    One layer after the other, as a decomposition needs many times the memory of what it leaves."""
    stack = site.layers.shape
    keys = jax.random.split(site.key, stack) if stack else site.key
    made = [fn(index, keys[index]) for index in np.ndindex(stack)]
    return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*stack, *parts[0].shape), *made)


def factors(site: Site, ranks: np.ndarray, fn: Callable[[tuple[int, ...], jax.Array, jax.Array, int], Pair]) -> Pair:
    """Factors from each layer's own matrix, padded: ``fn(index, key, w float32[in, out], rank)``.

    Raises ValueError naming a module that is too small for its rank."""
    width, (rows, columns) = int(ranks.max()), site.shape

    def one(index: tuple[int, ...], key: jax.Array) -> Pair:
        rank = int(ranks[index])
        if rank > min(rows, columns):
            module = site.modules[np.ravel_multi_index(index, site.layers.shape) if index else 0]
            raise ValueError(
                f"peft.rank: got {rank} for {module}, which is {rows} x {columns}; an initialisation that is taken out "
                f"of the matrix has at most {min(rows, columns)}. Lower it there with peft.rank_pattern."
            )
        if rank == 0:
            return jnp.zeros((rows, width)), jnp.zeros((width, columns))
        a, b = fn(index, key, verbs.dense(site.base[index]).astype(jnp.float32), rank)
        return jnp.pad(a, ((0, 0), (0, width - rank))), jnp.pad(b, ((0, width - rank), (0, 0)))

    return by_layer(site, one)


def orthogonal(site: Site, ranks: np.ndarray) -> Pair:
    """Factors that are not zero though their product is. Raises ValueError for an odd rank."""
    if (ranks % 2).any():
        module = site.modules[int(np.argmax(np.atleast_1d(ranks % 2)))]
        raise ValueError(
            f"peft.rank: got an odd one for {module}; init=orthogonal deals rows to two sides: an even one"
        )
    rows, columns = site.shape

    def one(index: tuple[int, ...], key: jax.Array, w: jax.Array, rank: int) -> Pair:
        q_key, a_key, b_key = jax.random.split(key, 3)
        q, _ = jnp.linalg.qr(jax.random.normal(q_key, (rank, rank)))
        a = jax.random.normal(a_key, (rows, rank // 2)) @ q[0::2]
        b = q[1::2].T @ jax.random.normal(b_key, (rank // 2, columns))
        return a / 10.0, b / 10.0

    return factors(site, ranks, one)


@functools.partial(jax.jit, static_argnames=("rank", "iterations"))
def pissa(key: jax.Array, w: jax.Array, rank: int, scale: Any, iterations: int | None = None) -> Pair:
    """The principal part of one layer: scale * A B is the best approximation of ``w`` of this rank.

    ``iterations`` of subspace iteration in a randomised decomposition; None: an exact one."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False) if iterations is None else _randomised(key, w, rank, iterations)
    return balanced(u[:, :rank], s[:rank] / scale, vt[:rank])


def balanced(u: jax.Array, s: jax.Array, vt: jax.Array) -> Pair:
    """``u diag(s) vt`` as two factors of equal size."""
    root = jnp.sqrt(s)
    return u * root, root[:, None] * vt


def _randomised(key: jax.Array, w: jax.Array, rank: int, iterations: int):
    """U [in, rank], S [rank], V^T [rank, out] of nearly the largest singular values."""
    basis, _ = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], rank)))
    for _ in range(iterations):
        basis, _ = jnp.linalg.qr(w.T @ basis)
        basis, _ = jnp.linalg.qr(w @ basis)
    u, s, vt = jnp.linalg.svd(basis.T @ w, full_matrices=False)
    return basis @ u, s, vt


@functools.partial(jax.jit, static_argnames="rank")
def olora(w: jax.Array, rank: int) -> Pair:
    """The first columns of the orthogonal factor of one layer, and their coefficients."""
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


def quantised(site: Site, ranks: np.ndarray, scale: np.ndarray, config: LoftQ) -> tuple[Any, jax.Array, jax.Array]:
    """LoftQ of all layers: (what stands in the base's place, A, B). Layers that are not adapted stay as they are."""
    if isinstance(site.base, Weight):
        raise ValueError(
            f"peft.init: loftq puts a quantised matrix in the place of {site.name.module}, which is a "
            f"{type(site.base).__name__} here; expected a plain array. In a list of methods put it first."
        )
    quantize = functools.partial(normal_float, bits=config.bits or 4)
    bases = {}

    def one(index: tuple[int, ...], key: jax.Array, w: jax.Array, rank: int) -> Pair:
        q, a, b = loftq(w, rank, scale[index], quantize, config.iterations)
        bases[index] = q.astype(site.base.dtype)
        return a, b

    a, b = factors(site, ranks, one)
    return by_layer(site, lambda index, key: bases.get(index, site.base[index])), a, b


def packed(
    site: Site, ranks: np.ndarray, scale: np.ndarray, init: str, turns: int, fast: int | None
) -> tuple[Any, jax.Array, jax.Array]:
    """loftq or qpissa of all layers of a base in few bits: (base, A, B); the very base where it stays as it is.

    Layers that are not adapted stay. Beside the base no more than one layer's matrix and its decomposition are held.
    ``fast``: as ``iterations`` of `pissa`. Raises ValueError where the matrices that were packed are not known, and for
    a base whose packing is not ours to repeat."""
    original, stays, bases = site.original, init == "loftq" and turns == 1, {}
    if original is None:
        raise ValueError(
            f"peft.init: {init} asks for {site.name.module} as it was before it was packed ({site.base!r}); expected a "
            "model that was read from float weights and packed meanwhile: jaxft.load(path, quantize=...), quant.method "
            "in a config. Point model.path to those, or choose another peft.init, such as pissa."
        )
    if not (stays or hasattr(site.base, "repacked")):
        raise ValueError(
            f"peft.init: {init} quantises {site.name.module} anew, and {site.base!r} is made by another procedure; "
            "expected nf4, fp4, int8 or fp8, or init=loftq with loftq.iterations=1, which leaves the base as it is"
        )

    def one(index: tuple[int, ...], key: jax.Array, _: jax.Array, rank: int) -> Pair:
        w, q = original(index).astype(jnp.float32), site.base[index]
        a, b = jnp.zeros((site.shape[0], rank)), jnp.zeros((rank, site.shape[1]))
        for turn in range(turns):
            if init == "loftq" and turn > 0:
                q = site.base.repacked(w - scale[index] * (a @ b))
            left = w if init == "qpissa" and turn == 0 else w - verbs.dense(q).astype(jnp.float32)
            a, b = pissa(jax.random.fold_in(key, turn), left, rank, scale[index], fast)
            if init == "qpissa":
                q = site.base.repacked(w - scale[index] * (a @ b))
        bases[index] = q
        return a, b

    a, b = factors(site, ranks, one)
    return site.base if stays else by_layer(site, lambda index, key: bases.get(index, site.base[index])), a, b


def loftq(
    w: jax.Array, rank: int, scale: float, quantize: Callable[[jax.Array], Any], iterations: int
) -> tuple[Any, jax.Array, jax.Array]:
    """(quantised weight, A, B) of one layer, whose sum ``q + scale * A B`` is near ``w``.

    ``quantize`` makes any weight of a matrix: an array of fewer values, or a leaf that stores fewer bits. peft leaves
    the scale out, so that its sum is near ``w`` only where the scale is 1; there the two agree."""
    low = jnp.zeros_like(w)
    q, a, b = w, w, w
    for _ in range(iterations):
        q = quantize(w - low)
        a, b = pissa(jax.random.key(0), w - verbs.dense(q), rank, scale)
        low = scale * (a @ b)
    return q, a, b


@functools.partial(jax.jit, static_argnames=("bits", "block"))
def normal_float(w: jax.Array, bits: int, block: int = 64) -> jax.Array:
    """``w`` [in, out] rounded to 2^bits values a block, spaced as a normal distribution's quantiles.

    Blocks run along the input features, as in torch's [out, in]; each is scaled by its largest magnitude. With 4 bits
    the values are those of NF4 (Dettmers et al. 2023, appendix E, arXiv:2305.14314)."""
    values = jnp.asarray(levels(bits), w.dtype)
    flat = w.T.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    largest = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
    middles = (values[1:] + values[:-1]) / 2
    nearest = values[jnp.searchsorted(middles, blocks / jnp.where(largest > 0, largest, 1.0))]
    return (nearest * largest).reshape(-1)[: flat.size].reshape(w.T.shape).T


@functools.cache
def levels(bits: int) -> np.ndarray:
    """The values of a normal float, ascending from -1 to 1, with 0 among them: float64[2^bits]."""
    half, normal = 2 ** (bits - 1), statistics.NormalDist()
    offset = 0.9677083
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    found = np.sort(np.array([*negative, 0.0, *positive]))
    return found / found.max()
