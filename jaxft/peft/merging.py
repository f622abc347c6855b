r"""How several low-rank updates of one matrix become one: peft's ``add_weighted_adapter``, in numpy on the host.

With the updates :math:`w_i s_i A_i B_i` (w the weight of the adapter, s its scale):

- ``cat`` joins the factors: exactly their sum, of the sum of their ranks. ``svd`` is the best approximation of that sum
  of a given rank.
- ``linear`` adds the factors themselves, each by :math:`\sqrt{|w_i s_i|}`, the sign with A: of equal ranks only, and a
  rough approximation, since :math:`(A_1 + A_2)(B_1 + B_2)` is not :math:`A_1 B_1 + A_2 B_2`.
- ``magnitude_prune`` first zeroes all but the share ``density`` of largest magnitude in each adapter's tensor.
- ``ties`` then adds, number by number, only those that have the sign of the (unweighted) sum, or of most, and divides
  by how many they are: Yadav et al. 2023, "TIES-Merging", algorithm 1 (arXiv:2306.01708).
- ``dare_linear`` and ``dare_ties`` instead zero numbers at random and divide what is left by the density: Yu et al.
  2024, "Language Models are Super Mario", eq. 1 (arXiv:2311.03099).

Each of the last four does so with the factors, as ``linear``; with ``_svd`` behind its name with the updates
themselves, [in, out], which are then approximated by factors: slower, and what the papers mean.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

FACTORS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
HOWS = ("cat", "svd", *FACTORS, *(f"{how}_svd" for how in FACTORS[1:]))


class Update(NamedTuple):
    """One adapter's update of one matrix: ``weight * scale * a @ b``."""

    a: np.ndarray
    """[in, r]"""
    b: np.ndarray
    """[r, out]"""
    scale: float
    """The adapter's own."""
    weight: float


@dataclass(frozen=True)
class Recipe:
    """What is to be done. Raises ValueError for what makes no sense."""

    how: str = "cat"
    density: float | None = None
    """Share of numbers that are kept, where some are not."""
    rank: int | None = None
    """Of the result, where it is an approximation; default: the largest of the adapters."""
    sign: Literal["total", "frequency"] = "total"
    """Whose sign counts in ties: that of the sum, or that of most."""
    seed: int = 0
    """Of what is zeroed at random."""

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise ValueError(f"how: got {self.how!r}; expected one of {', '.join(HOWS)}")
        if self.prunes and self.density is None:
            raise ValueError(f"density: {self.how} keeps a share of the numbers; say which, for example density=0.5")
        if self.density is not None and not (self.prunes and 0.0 < self.density <= 1.0):
            kinds = "more than 0 and at most 1" if self.prunes else f"none, as {self.how} keeps all numbers"
            raise ValueError(f"density: got {self.density}; expected {kinds}")
        if self.rank is not None and not (self.how.endswith("svd") and self.rank >= 1):
            ways = ", ".join(how for how in HOWS if how.endswith("svd"))
            raise ValueError(f"rank: got {self.rank} with how={self.how}; expected at least 1, with one of {ways}")
        if self.sign not in ("total", "frequency"):
            raise ValueError(f"sign: got {self.sign!r}; expected total or frequency")

    @property
    def prunes(self) -> bool:
        """Whether some numbers are zeroed."""
        return self.how.startswith(("ties", "dare", "magnitude"))


def merged(recipe: Recipe, updates: list[Update], rank: int, draws: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The factors a [in, r] and b [r, out] of the result, without a scale. ``rank``: the largest r of an approximation.

    Raises ValueError if the factors are to be added and their ranks differ."""
    scales = [u.weight * u.scale for u in updates]
    if recipe.how in ("cat", "svd"):
        a = np.concatenate([scale * u.a for scale, u in zip(scales, updates, strict=True)], axis=1)
        b = np.concatenate([u.b for u in updates])
        return (a, b) if recipe.how == "cat" else _approximated(a, b, rank)
    if recipe.how.endswith("svd"):
        whole = _added(recipe, [u.scale * (u.a @ u.b) for u in updates], [u.weight for u in updates], draws)
        return _cut(*np.linalg.svd(whole, full_matrices=False), rank)
    ranks = sorted({u.a.shape[1] for u in updates})
    if len(ranks) > 1:
        raise ValueError(f"adapters of ranks {ranks}; expected one rank where factors are added: use cat or one of svd")
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    a = _added(recipe, [u.a for u in updates], signed, draws)
    return a, _added(recipe, [u.b for u in updates], roots, draws)


def _added(recipe: Recipe, tensors: list[np.ndarray], weights: list[float], draws: np.random.Generator) -> np.ndarray:
    """The weighted sum of the tensors, of what pruning leaves of them, with ties by the signs they agree on."""
    left = np.stack([_pruned(recipe, tensor, draws) for tensor in tensors])
    weighted = np.asarray(weights, left.dtype).reshape(-1, *[1] * (left.ndim - 1)) * left
    if "ties" not in recipe.how:
        return weighted.sum(0)
    elected = np.sign(left) if recipe.sign == "frequency" else left
    agrees = np.sign(left) == np.where(elected.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def _pruned(recipe: Recipe, tensor: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    density = recipe.density
    if density is None or density == 1.0:
        return tensor
    if recipe.how.startswith("dare"):
        return np.where(_kept(draws, tensor.shape, density), tensor / density, 0).astype(tensor.dtype)
    largest = np.argsort(-np.abs(tensor), axis=None, kind="stable")[: int(density * tensor.size)]
    left = np.zeros_like(tensor)
    left.flat[largest] = tensor.flat[largest]
    return left


def _kept(draws: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    """bool: each true with probability ``density``."""
    return draws.random(shape) < density


def _approximated(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best factors of ``a @ b`` of at most that rank. Unusual: found at rank width; the product is never made."""
    (rows, left), (columns, right) = np.linalg.qr(a), np.linalg.qr(b.T)
    u, values, v = np.linalg.svd(left @ right.T, full_matrices=False)
    return _cut(rows @ u, values, v @ columns.T, rank)


def _cut(u: np.ndarray, values: np.ndarray, v: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the largest singular values, which go to b, as in peft."""
    return u[:, :rank], values[:rank, None] * v[:rank]
