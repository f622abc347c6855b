r"""LoRA factors that begin from data: EVA and CorDA, from the exact second moments of each layer's inputs.

EVA (Paischer et al. 2024, alg. 1, arXiv:2410.07170): A holds the directions in which the inputs vary most, B is zero,
and ranks move to the layers whose directions explain most of their variance: of all layers' first :math:`\rho r`
explained-variance ratios the largest are taken, as many as there were ranks. peft finds the directions by an
incremental decomposition of the centred inputs; here they are eigenvectors of the whole covariance.

CorDA (Yang et al. 2024, eqs. 2 to 5, arXiv:2406.05223): with C the mean of x x^T,
:math:`W^\top C = U S V^\top`, and the r largest (ipm, for learning the task) or smallest (kpm, for keeping what the
data show) triplets are taken out of W: :math:`A = C^{-1} V (S/s)^{1/2}`, :math:`B = (S/s)^{1/2} U^\top`. As in peft's
code, each sample is divided by its largest entry first, and C is damped until it can be inverted.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.peft import lora_init, targets
from jaxft.peft.calibration import Measured
from jaxft.peft.lora_init import Pair


@dataclass(frozen=True)
class EVA:
    """Settings of the eva initialisation."""

    rho: float = 2.0
    """Largest rank of a layer, as a multiple of its own; 1 moves no ranks between layers."""
    loss_only: bool = True
    """Whether only positions that carry loss are looked at."""
    whiten: bool = False
    """Whether directions are divided by the square root of their singular values."""
    adjust_alpha: bool = True
    """Whether alpha moves with the rank of a layer."""

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError(f"peft.eva.rho: got {self.rho}; expected at least 1")


@dataclass(frozen=True)
class CorDA:
    """Settings of the corda initialisation."""

    method: Literal["ipm", "kpm"] = "ipm"
    """ipm: the directions that matter most to the data train; kpm: those that matter least, to keep what it shows."""


class Directions(NamedTuple):
    """What EVA found for one weight."""

    vectors: jax.Array
    """float32[*stack, in, R], zero beyond each layer's rank."""
    ranks: np.ndarray
    """int32[*stack]; 0 for a layer that gets none."""


def directions(
    measured: dict[str, Measured], config: EVA, rank: int, rank_pattern: dict[str, int]
) -> dict[str, Directions]:
    """EVA's directions by path; ``rank`` and ``rank_pattern`` say what there is to share out."""
    own = {path: _own_ranks(m, rank, rank_pattern) for path, m in measured.items()}
    most = {path: np.minimum(np.round(own[path] * config.rho), m.total.shape[-1]) for path, m in measured.items()}
    spectra = {path: _spectra(m, int(most[path].max()), config.whiten) for path, m in measured.items()}
    candidates = [
        (-ratio, path, index)
        for path, (_, ratios) in spectra.items()
        for index in np.ndindex(most[path].shape)
        for ratio in ratios[index][: int(most[path][index])]
    ]
    candidates.sort(key=lambda c: c[0])  # stable: of equals, as of one input's several layers, the first goes first
    ranks = {path: np.zeros(own[path].shape, np.int32) for path in measured}
    for _, path, index in candidates[: int(sum(r.sum() for r in own.values()))]:
        ranks[path][index] += 1
    out = {}
    for path, (vectors, _) in spectra.items():
        width = max(int(ranks[path].max()), 1)
        real = jnp.arange(width) < ranks[path][..., None, None]
        out[path] = Directions(jnp.where(real, vectors[..., :width], 0.0), ranks[path])
    return out


def _own_ranks(m: Measured, rank: int, pattern: dict[str, int]) -> np.ndarray:
    """int[*stack]: each layer's rank before any was moved, 0 where it is not adapted."""
    layers = m.target.layers
    found = targets.pattern_values(m.target.modules, dict(pattern), rank).reshape(layers.shape)
    return np.where(layers, found, 0).astype(np.int32)


def _spectra(m: Measured, most: int, whiten: bool) -> tuple[jax.Array, np.ndarray]:
    """(directions [*stack, in, most], explained-variance ratios [*stack, most]), largest first."""
    stack = m.count.shape
    made = [_principal(m.gram[i], m.total[i], m.count[i], most, whiten) for i in np.ndindex(stack)]
    vectors = jnp.stack([v for v, _ in made]).reshape(*stack, *made[0][0].shape)
    return vectors, np.stack([np.asarray(r) for _, r in made]).reshape(*stack, most)


@functools.partial(jax.jit, static_argnames=("most", "whiten"))
def _principal(gram: jax.Array, total: jax.Array, count: jax.Array, most: int, whiten: bool) -> Pair:
    mean = total / count
    values, vectors = jnp.linalg.eigh(gram - count * jnp.outer(mean, mean))
    values, vectors = jnp.maximum(values[::-1], 0.0), vectors[:, ::-1]
    ratios = values[:most] / jnp.sum(values)
    vectors = vectors[:, :most]
    largest = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=0)[None], axis=0)
    vectors = vectors * jnp.sign(largest)  # peft's choice of the two
    if whiten:
        vectors = vectors / values[:most] ** 0.25
    return vectors, ratios


def covariances(measured: dict[str, Measured]) -> dict[str, jax.Array]:
    """CorDA's C by path: the mean over samples of the sum over their positions."""
    return {path: m.gram / m.count[..., None, None] for path, m in measured.items()}


@functools.partial(jax.jit, static_argnames=("rank", "method"))
def corda(w: jax.Array, covariance: jax.Array, rank: int, scale: Any, method: str) -> Pair:
    """The part of one layer ``w`` [in, out] that matters most (ipm) or least (kpm) to the data."""
    damped, inverse = _inverted(covariance)
    v, s, ut = jnp.linalg.svd(damped @ w, full_matrices=False)
    part = slice(0, rank) if method == "ipm" else slice(s.shape[0] - rank, None)
    return lora_init.balanced(inverse @ v[:, part], s[part] / scale, ut[part])


def _inverted(covariance: jax.Array) -> Pair:
    """The covariance with enough added to its diagonal that its inverse is good, and the inverse."""
    eye = jnp.eye(covariance.shape[0], dtype=covariance.dtype)

    def damped(share: jax.Array) -> Pair:
        fixed = covariance + share * jnp.mean(jnp.diag(covariance)) * eye
        return fixed, jnp.linalg.inv(fixed)

    def bad(share: jax.Array) -> jax.Array:
        fixed, inverse = damped(share)
        # not (error < 0.05): an inverse that is not finite is bad too
        return ~(jnp.linalg.norm(fixed @ inverse - eye) < 0.05) & (share < 1e3)

    return damped(jax.lax.while_loop(bad, lambda share: 2 * share, jnp.float32(0.01)))
