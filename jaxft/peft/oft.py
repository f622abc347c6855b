r"""OFT: the input is rotated in blocks before the frozen weight.

.. math:: y = x\,R\,W, \qquad R = \mathrm{diag}(R_1, \dots, R_n), \qquad R_i = (I + Q_i)(I - Q_i)^{-1}, \qquad
          Q_i^T = -Q_i

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", eq. 3 to 5 (arXiv:2306.07280); turning
the input, and Cayley's map by a short Neumann series, :math:`R_i \approx I + 2Q_i + \dots + 2Q_i^{n-2} + Q_i^{n-1}`:
Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", eq. 3 and 5 (arXiv:2506.19847). COFT keeps each
:math:`\|Q_i\|_F \le \epsilon/\sqrt{n}`: it is scaled back where it is used, and the gradient is that of the scaled one.
A training step scales back what it stores as well (`hooks`), as peft does in its forward pass; a loop without the hooks
lets what is stored grow beyond.

A module of width ``in`` in blocks of b trains in (b - 1) / 2 numbers, b (b - 1) / 2 if its blocks are shared. As in
peft the exact inverse turns the other way, ``(I - Q)(I + Q)^-1``. peft's module_dropout does nothing, there or here.
"""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import hooks as hooks_
from jaxft.core import tree, verbs
from jaxft.core.hooks import Hooks
from jaxft.core.weight import Untied, Weight, parameter, static, trainable, weight
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.formats import Fields, Format
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class OFT(Targeted):
    """Orthogonal finetuning. Default learning rate 4e-4."""

    block_size: int | None = None
    """Width of a rotated block; default 32. A module takes the divisor of its own width that is nearest."""
    blocks: int | None = None
    """Number of blocks of each module, instead of their size; likewise the nearest that divides."""
    neumann_terms: int | None = 5
    """Terms of the series that stands for the inverse in Cayley's map; null: the exact inverse."""
    coft_eps: float | None = None
    """How far a rotation may go (COFT): the largest norm of a module's skew matrices; null: as far as it likes."""
    block_share: bool = False
    """Whether all blocks of a module turn alike."""

    embeddings: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block_size is not None and self.blocks is not None:
            got = f"{self.blocks} besides peft.block_size={self.block_size}"
            raise ValueError(f"peft.blocks: got {got}; expected one of the two")
        terms, eps = self.neumann_terms, self.coft_eps
        checks = {
            "block_size": (self.block_size is None or self.block_size >= 2, "at least 2"),
            "blocks": (self.blocks is None or self.blocks >= 1, "at least 1"),
            "neumann_terms": (terms is None or terms >= 2, "at least 2 (one is the identity), or null"),
            "coft_eps": (eps is None or eps > 0, "more than 0, or null"),
        }
        for field, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected {expected}")

    def wrap(self, site: Site) -> "OFTWeight":
        if site.follows:
            raise ValueError(
                f"peft.ensure_weight_tying: got true; expected false: a head tied to {site.modules[0]} does not follow "
                "its rotation, here as in peft"
            )
        lookup = site.name.kind == "embedding"
        number, size = self.blocks_of(site.modules[0], site.shape[1 if lookup else 0])
        rows = 1 if self.block_share else number
        return OFTWeight(
            base=site.base,
            skew=jnp.zeros((*site.layers.shape, rows, size * (size - 1) // 2)),
            gate=site.gate,
            terms=self.neumann_terms,
            eps=self.coft_eps,
            share=self.block_share,
            asked=(self.block_size or (0 if self.blocks else 32), self.blocks or 0),
            lookup=lookup,
            tied=site.follows,
        )

    def blocks_of(self, module: str, width: int) -> tuple[int, int]:
        """(number, size) of the blocks of a module; raises ValueError where only blocks of one would fit."""
        by_number = self.blocks is not None
        divisor = nearest_divisor(width, self.blocks or self.block_size or 32)
        number = divisor if by_number else width // divisor
        if number == width:
            field = "blocks" if by_number else "block_size"
            raise ValueError(
                f"peft.{field}: got {getattr(self, field)} for {module}, {width} wide: the nearest divisor leaves "
                "blocks of 1, which cannot turn; expected a number near another one. Or leave it out with peft.exclude."
            )
        return number, width // number


def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of ``width`` that is nearest to ``wanted``, of two equally near the smaller: peft's choice."""
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - wanted), d))


@weight
class OFTWeight(Weight):
    """``(x + x (R - I)) @ base``. skew: [*stack, blocks, b (b - 1) / 2], Q above the diagonals (one row if shared).

    ``asked``: the (block_size, blocks) of the config, one of them 0. ``lookup``: whether the base is an embedding, so
    that its features turn; ``tied``: as in InPlace.
    """

    base: Any = parameter()
    skew: jax.Array = trainable()
    gate: jax.Array
    terms: int | None = static(default=5)
    eps: float | None = static(default=None)
    share: bool = static(default=False)
    asked: tuple[int, int] = static(default=(32, 0))
    lookup: bool = static(default=False)
    tied: bool | None = static(default=None)

    def _turned(self, x: jax.Array) -> jax.Array:
        turn = turns(self.skew, self.terms, self.eps) * self.gate[..., None, None, None]
        return rotate(x, turn.astype(x.dtype))

    def __rmatmul__(self, x):
        return self._turned(x @ self.base) if self.lookup else self._turned(x) @ self.base

    def take(self, ids):
        return self._turned(verbs.take(self.base, ids))

    def unembed(self, x):
        return verbs.unembed(self.base, x)

    def dense(self):
        if not self.lookup:
            return super().dense()
        if self.ndim > 2:
            return jax.vmap(OFTWeight.dense)(self)
        with jax.default_matmul_precision("highest"):
            return self._turned(verbs.dense(self.base).astype(jnp.float32)).astype(self.dtype)

    def merged(self):
        return Untied(self.dense(), self.base) if self.tied is False else super().merged()


@functools.partial(jax.checkpoint, static_argnums=(1, 2))
def turns(vector: jax.Array, terms: int | None, eps: float | None) -> jax.Array:
    """``R - I`` of each block, float32[n, b, b], from what is above the diagonal of Q, [n, b (b - 1) / 2].

    Made anew in the backward pass: next to the activations it costs nothing, its powers of Q would be large."""
    if eps is not None:
        vector = _projected(vector, eps)
    size = (1 + math.isqrt(1 + 8 * vector.shape[-1])) // 2
    above = jnp.zeros((vector.shape[0], size, size)).at[:, *np.triu_indices(size, 1)].set(vector)
    with jax.default_matmul_precision("highest"):
        return cayley(above - jnp.swapaxes(above, -1, -2), terms)


def cayley(skew: jax.Array, terms: int | None) -> jax.Array:
    """``R - I`` of the rotations [n, b, b] that belong to skew-symmetric matrices: see the module's equation.

    ``terms``: of the series; None: the exact ``(I - Q)(I + Q)^-1``, which is I - 2 (I + Q)^-1 Q."""
    if terms is None:
        return -2 * jnp.linalg.solve(jnp.eye(skew.shape[-1]) + skew, skew)
    if terms == 2:
        return 2 * skew
    total = skew  # Horner's rule; in peft three terms are four
    for _ in range(max(terms, 4) - 2):
        total = 2 * skew + skew @ total
    return total


def _projected(vector: jax.Array, eps: float) -> jax.Array:
    """[*stack, rows, n]: the rows scaled back to skew matrices of norm eps / sqrt(rows) at most.

    The gradient passes unchanged."""
    limit = eps / math.sqrt(vector.shape[-2])
    norm = math.sqrt(2) * jnp.linalg.norm(vector, axis=-1, keepdims=True)
    scaled = vector * (limit / jnp.maximum(norm, limit))
    return vector + jax.lax.stop_gradient(scaled - vector)


def hooks(config: OFT, params: tree.Params, steps: int) -> Hooks:
    """With COFT, what was trained is scaled back after each step."""
    del params, steps
    return hooks_.NONE if config.coft_eps is None else COFT


def _scaled_back(step: jax.Array, trainable: tree.Params, grads: tree.Params, state: None) -> tuple[tree.Params, None]:
    del step, grads

    def one(w: Any) -> Any:
        if not _is_mine(w):
            return w
        eps, base = w.eps, jax.tree.map(one, w.base, is_leaf=_is_mine)
        skew = w.skew if eps is None else jax.tree.map(lambda v: _projected(v, eps), w.skew)
        return dataclasses.replace(w, base=base, skew=skew)

    return jax.tree.map(one, trainable, is_leaf=_is_mine), state


def _is_mine(w: Any) -> bool:
    return isinstance(w, OFTWeight)


COFT = Hooks(update=_scaled_back)  # of all OFT weights at once, whichever config they are of


def rotate(x: jax.Array, turn: jax.Array) -> jax.Array:
    """``x + x turn``, block by block: x [..., n b], turn [n, b, b], or [1, b, b] for all blocks."""
    size = turn.shape[-1]
    blocks = x.reshape(*x.shape[:-1], -1, size)
    turn = jnp.broadcast_to(turn, (blocks.shape[-2], size, size))
    return x + jnp.einsum("...nb,nbc->...nc", blocks, turn).reshape(x.shape)


def config_of(config: Fields) -> OFT:
    """Our settings from peft's."""
    series = config.get("use_cayley_neumann", True)
    return OFT(
        block_size=config.get("oft_block_size", 32) or None,
        blocks=config.get("r") or None,
        neumann_terms=config.get("num_cayley_neumann_terms", 5) if series else None,
        coft_eps=config.get("eps", 6e-5) if config.get("coft") else None,
        block_share=bool(config.get("block_share")),
    )


def describe(w: OFTWeight) -> Fields:
    """What all adapted modules have in common."""
    fields: Fields = {"oft_block_size": w.asked[0], "r": w.asked[1], "block_share": w.share, "coft": w.eps is not None}
    fields |= {} if w.eps is None else {"eps": w.eps}
    fields["use_cayley_neumann"] = w.terms is not None
    fields |= {} if w.terms is None else {"num_cayley_neumann_terms": w.terms}
    return fields | {"peft_version": SERIES}


def write(w: OFTWeight) -> Tensors:
    """One layer's numbers."""
    return {EMBEDDING if w.lookup else LINEAR: np.asarray(w.skew)}


def read(w: OFTWeight, tensors: Tensors) -> OFTWeight:
    """One layer with its numbers."""
    (skew,) = tensors.values()
    return dataclasses.replace(w, skew=skew)


def refuse(where: object, config: Fields) -> None:
    """Raises AdapterError for a series of no terms, and for that of older versions, whose last term was another."""
    terms = config.get("num_cayley_neumann_terms", 5)
    if config.get("use_cayley_neumann", True) and terms < 2:
        remedy = "Series of fewer terms are the identity: the adapter does nothing, in peft too."
        raise AdapterError(f"{where}: num_cayley_neumann_terms", repr(terms), "at least 2", remedy)
    version = config.get("peft_version") or "0"
    if config.get("use_cayley_neumann", True) and tuple(map(int, re.findall(r"\d+", version)[:2])) < (0, 18):
        remedy = "Before it the series was another, and the version at hand would not give its results either."
        raise AdapterError(f"{where}: peft_version", repr(config.get("peft_version")), f"{SERIES} or later", remedy)


SERIES = "0.18.0"  # the version of peft whose Neumann series this is
LINEAR, EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"
FORMAT = Format(
    peft_type="OFT",
    leaf=OFTWeight,
    fields=(
        "r", "oft_block_size", "module_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "init_weights",
        "layers_to_transform", "layers_pattern", "coft", "eps", "block_share", "use_cayley_neumann",
        "num_cayley_neumann_terms",
    ),
    config=config_of,
    describe=describe,
    suffixes=(LINEAR, EMBEDDING),
    write=write,
    read=read,
    refuse=refuse,
)  # fmt: skip
