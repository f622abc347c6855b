r"""LoHa: an update of high rank from the elementwise product of two low-rank ones.

.. math:: y = x W + s\, x \big((A_1 B_1) \circ (A_2 B_2)\big), \qquad s = \alpha / r

Hyeon-Woo, Ye-Bin, Oh 2021, "FedPara", proposition 1 (arXiv:2108.06098); as an adapter: Yeh et al. 2023, "LyCORIS"
(arXiv:2309.14859). 2 r (in + out) parameters a module. The factors are [in, r] and [r, out], transposed from torch.

Unusual: the dense product is never formed. It is a product of rank r^2 of the Khatri-Rao products of the factors, by
rows ``U = A_1 (.) A_2`` [in, r^2] and by columns ``V = B_1 (.) B_2`` [r^2, out]. So ``(x U) V`` takes r^2 (in + out)
multiplications a token where the dense matrix takes in * out, 1/32 of that at rank 8 and width 4096; U and V are made
again in the backward pass. Where r^2 reaches min(in, out) the update has full rank, and this no longer pays.
peft's dropouts (of whole output features, of whole modules) are not offered; a trained adapter does not use them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import products
from jaxft.core.weight import Weight, parameter, trainable, weight
from jaxft.peft import factors
from jaxft.peft.disk import Tensors
from jaxft.peft.formats import Format, padded
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class LoHa(Targeted):
    """Elementwise product of two low-rank updates. Default learning rate 1e-3."""

    rank: int = 8
    """Rank r of both; their product has rank up to r^2."""
    alpha: float = 8.0
    """Numerator of the scale alpha / rank."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ranks that differ: a regex for the end of a module name to its rank."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Alphas that differ, likewise."""

    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"peft.rank: got {self.rank}; expected at least 1")

    def wrap(self, site: Site) -> "LoHaWeight":
        ranks = site.values(self.rank, self.rank_pattern, np.int32)
        one, two = jax.random.split(site.key)
        a1, b1 = factors.pair(one, *site.shape, ranks)
        a2, b2 = factors.pair(two, *site.shape, ranks)
        return LoHaWeight(
            base=site.base,
            a1=a1,
            b1=b1,
            a2=jnp.zeros_like(a2),
            b2=b2,
            alpha=jnp.asarray(site.values(self.alpha, self.alpha_pattern)),
            rank=jnp.asarray(ranks),
            gate=site.gate,
        )


@weight
class LoHaWeight(Weight):
    """``x @ base + alpha / rank * x @ ((a1 @ b1) * (a2 @ b2))``. a1, a2: [*stack, in, r]; b1, b2: [*stack, r, out].

    alpha: float32[*stack]; rank: int32[*stack], beyond which the factors are zero."""

    base: Any = parameter()
    a1: jax.Array = trainable()
    b1: jax.Array = trainable()
    a2: jax.Array = trainable()
    b2: jax.Array = trainable()
    alpha: jax.Array
    rank: jax.Array
    gate: jax.Array

    linear: ClassVar[tuple[str, ...]] = ("b1",)

    def __rmatmul__(self, x):
        scale = self.gate * self.alpha / jnp.maximum(self.rank, 1).astype(self.alpha.dtype)
        low = products.remade(x, products.by_rows, self.a1, self.a2)
        return x @ self.base + products.remade(low * scale.astype(x.dtype), products.by_columns, self.b1, self.b2)

    def axes(self, names):
        stack, (rows, columns) = names[:-2], names[-2:]
        wide, narrow = (*stack, rows, None), (*stack, None, columns)
        return super().axes(names) | {"a1": wide, "b1": narrow, "a2": wide, "b2": narrow}


KEYS = {"hada_w1_a": "b1", "hada_w1_b": "a1", "hada_w2_a": "b2", "hada_w2_b": "a2"}


def write(w: LoHaWeight) -> Tensors:
    """One layer's factors, without padding."""
    rank = int(w.rank)
    parts = {key: np.asarray(getattr(w, name)).T for key, name in KEYS.items()}
    return {key: part[:, :rank] if key.endswith("a") else part[:rank] for key, part in parts.items()}


def read(w: LoHaWeight, tensors: Tensors) -> LoHaWeight:
    """One layer with its factors."""
    parts = {name: padded(tensors[key].T, np.asarray(getattr(w, name))) for key, name in KEYS.items()}
    return dataclasses.replace(w, **parts)


FORMAT = Format(
    peft_type="LOHA",
    leaf=LoHaWeight,
    fields=(
        "r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "target_modules", "exclude_modules",
        "init_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    ),
    config=lambda config: LoHa(
        rank=config.get("r", 8),
        alpha=config.get("alpha", 8),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    ),
    describe=lambda w: {},
    suffixes=tuple(KEYS),
    write=write,
    read=read,
    values=lambda w: {"r": int(w.rank), "alpha": float(w.alpha)},
    patterned={"r": "rank_pattern", "alpha": "alpha_pattern"},
    biases=False,
)  # fmt: skip
