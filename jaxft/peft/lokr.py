r"""LoKr: an update that is the Kronecker product of two small matrices.

.. math:: y = x W + s\, x (W_1 \otimes W_2), \qquad s = \alpha / r

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
(arXiv:2309.14859); the product: Edalati et al. 2022, "KronA" (arXiv:2212.10650). With in = m n and out = l k, W_1 is
[m, l] and W_2 [n, k], and one that is large beside the rank is itself a product ``A B`` of that rank. Parameters of a
module: m l, or r (m + l), and n k, or r (n + k). All are transposed from torch.

The Kronecker product is never formed: x is read as an [m, n] matrix and multiplied from both sides, in the order that
takes the fewest multiplications, about in * (l + k) a token instead of in * out. peft's dropouts (of output features,
of whole modules) are not offered here; a trained adapter does not use them.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft.disk import Tensors
from jaxft.peft.factors import pair
from jaxft.peft.formats import Fields, Format, padded
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class LoKr(Targeted):
    """Kronecker product of two small matrices. Default learning rate 1e-3."""

    rank: int = 8
    """Rank r of a factor that is itself a product: one whose longer side is more than 2 r."""
    alpha: float = 8.0
    """Numerator of the scale alpha / rank."""
    decompose_both: bool = False
    """Whether the first factor may be a product as well."""
    decompose_factor: int = -1
    """Size m (and l) of the first factor, or a smaller divisor where it does not divide; -1: near the square root."""
    init: Literal["first_zero", "second_zero"] = "first_zero"
    """Which factor starts at zero, the other being random: the first as in peft, or the second as in LyCORIS."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ranks that differ: a regex for the end of a module name to its rank."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Alphas that differ, likewise."""

    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"peft.rank: got {self.rank}; expected at least 1")
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ValueError(f"peft.decompose_factor: got {self.decompose_factor}; expected -1, or at least 1")
        if self.init not in ("first_zero", "second_zero"):
            raise ValueError(f"peft.init: got {self.init!r}; expected first_zero or second_zero")

    def wrap(self, site: Site) -> "LoKrWeight":
        ranks = site.values(self.rank, self.rank_pattern, np.int32)
        (m, n), (l, k) = (split(size, self.decompose_factor) for size in site.shape)
        one, two = jax.random.split(site.key)
        zero = ("b", None) if self.init == "first_zero" else (None, "a")
        first = _factor(one, site, (m, l), ranks, not self.decompose_both, zero[0])
        second = _factor(two, site, (n, k), ranks, False, zero[1])
        return LoKrWeight(
            base=site.base,
            alpha=jnp.asarray(site.values(self.alpha, self.alpha_pattern)),
            rank=jnp.asarray(ranks),
            gate=site.gate,
            **{f"{part}1": array for part, array in first.items()},
            **{f"{part}2": array for part, array in second.items()},
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
        )


@weight
class LoKrWeight(Weight):
    """``x @ base + alpha / rank * x @ kron(w1, w2)``. w1: [*stack, m, l]; w2: [*stack, n, k].

    In the place of w1 may be its factors a1 [*stack, m, r] and b1 [*stack, r, l], and so for w2. alpha:
    float32[*stack]; rank: int32[*stack], beyond which a and b are zero."""

    base: Any = parameter()
    alpha: jax.Array
    rank: jax.Array
    gate: jax.Array
    w1: jax.Array | None = trainable(default=None)
    a1: jax.Array | None = trainable(default=None)
    b1: jax.Array | None = trainable(default=None)
    w2: jax.Array | None = trainable(default=None)
    a2: jax.Array | None = trainable(default=None)
    b2: jax.Array | None = trainable(default=None)
    decompose_both: bool = static(default=False)
    decompose_factor: int = static(default=-1)

    linear: ClassVar[tuple[str, ...]] = ("alpha",)

    def __rmatmul__(self, x):
        (m, n), _ = (split(size, self.decompose_factor) for size in self.shape)
        parts = {AXES[name]: array.astype(x.dtype) for name, array in factors(self).items()}
        scale = self.gate * self.alpha / jnp.maximum(self.rank, 1).astype(self.alpha.dtype)
        terms = f"...mn,{','.join(parts)}->...lk"
        y = jnp.einsum(terms, x.reshape(*x.shape[:-1], m, n), *parts.values(), optimize="optimal")
        return x @ self.base + y.reshape(*x.shape[:-1], -1) * scale.astype(x.dtype)


AXES = {"w1": "ml", "a1": "mp", "b1": "pl", "w2": "nk", "a2": "nq", "b2": "qk"}
KEYS = {"w1": "lokr_w1", "a1": "lokr_w1_b", "b1": "lokr_w1_a", "w2": "lokr_w2", "a2": "lokr_w2_b", "b2": "lokr_w2_a"}


def factors(w: LoKrWeight) -> dict[str, Any]:
    """The factors that there are, by field."""
    return {name: array for name in AXES if (array := getattr(w, name)) is not None}


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``size``: the first is ``factor`` where that divides, else the largest divisor up to
    it and to the square root; with a factor of -1, up to the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(d for d in range(1, most + 1) if size % d == 0)
    return first, size // first


def _factor(
    key: jax.Array, site: Site, sizes: tuple[int, int], ranks: np.ndarray, whole: bool, zero: str | None
) -> dict[str, jax.Array]:
    """One factor of the Kronecker product, [rows, columns] = ``sizes``: w, or a and b.

    ``zero``: the part that starts at zero; w does wherever it is given. Raises ValueError for layers unalike."""
    rows, columns = sizes
    alone = (whole | (2 * ranks >= max(sizes)))[site.layers]
    if alone.any() != alone.all():
        raise ValueError(
            f"peft.rank_pattern: got ranks {sorted(set(ranks[site.layers].tolist()))} for the layers of "
            f"{site.name.module}; expected all below, or none below, {max(sizes) / 2:g}, where its factor "
            f"{list(sizes)} becomes a product of that rank: the layers of a stack are factored alike"
        )
    if alone.all():
        w = jax.random.uniform(key, (*ranks.shape, *sizes), minval=-1.0, maxval=1.0) / np.sqrt(rows)
        return {"w": jnp.zeros_like(w) if zero else w}
    drawn = dict(zip("ab", pair(key, rows, columns, ranks), strict=True))
    return drawn | ({zero: jnp.zeros_like(drawn[zero])} if zero else {})


def write(w: LoKrWeight) -> Tensors:
    """One layer's factors, without padding."""
    rank = int(w.rank)
    cut = {"w": np.s_[:, :], "a": np.s_[:, :rank], "b": np.s_[:rank]}
    return {KEYS[name]: np.asarray(array)[cut[name[0]]].T for name, array in factors(w).items()}


def read(w: LoKrWeight, tensors: Tensors) -> LoKrWeight:
    """One layer with its factors."""
    parts = {name: padded(tensors[KEYS[name]].T, np.asarray(array)) for name, array in factors(w).items()}
    return dataclasses.replace(w, **parts)


def config_of(config: Fields) -> LoKr:
    """Our settings from peft's."""
    return LoKr(
        rank=config.get("r", 8),
        alpha=config.get("alpha", 8),
        decompose_both=bool(config.get("decompose_both", False)),
        decompose_factor=config.get("decompose_factor", -1),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


FORMAT = Format(
    peft_type="LOKR",
    leaf=LoKrWeight,
    fields=(
        "r", "alpha", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both",
        "decompose_factor", "target_modules", "exclude_modules", "init_weights", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern",
    ),
    config=config_of,
    describe=lambda w: {"decompose_both": w.decompose_both, "decompose_factor": w.decompose_factor},
    suffixes=tuple(KEYS.values()),
    write=write,
    read=read,
    values=lambda w: {"r": int(w.rank), "alpha": float(w.alpha)},
    patterned={"r": "rank_pattern", "alpha": "alpha_pattern"},
    biases=False,
)  # fmt: skip
