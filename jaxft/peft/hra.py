r"""HRA: the input goes through a chain of r Householder reflections before the frozen weight.

.. math:: y = x\,H_r \cdots H_1\,W, \qquad H_i = I - 2 u_i u_i^T, \quad \|u_i\| = 1

Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
eq. 4 (arXiv:2405.17484). A module of width ``in`` trains r in numbers.

The chain is one pair of thin products: with the compact WY form :math:`H_1 \cdots H_r = I - U T U^T`, where
:math:`T^{-1}` is the upper triangle of :math:`U^T U` with its diagonal halved (Joffrain et al. 2006, "Accumulating
Householder transformations, revisited", eq. 9), :math:`x H_r \cdots H_1 = x - ((x U) T^T) U^T`. Columns that
Gram-Schmidt has made orthogonal reflect in any order, and T is 2 I.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft.disk import Tensors
from jaxft.peft.formats import Fields, Format
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class HRA(Targeted):
    """Householder reflection adaptation. Default learning rate 1e-3.

    Reflections start in equal pairs, which undo each other. With an odd rank one is left over, and orthogonal ones
    cannot be equal: then, as in peft, the model is not the base's at the first step."""

    rank: int = 8
    """Number of reflections; best even."""
    gram_schmidt: bool = False
    """Whether the directions are made orthogonal (peft's apply_GS)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"peft.rank: got {self.rank}; expected at least 1")

    def wrap(self, site: Site) -> "HRAWeight":
        width = site.shape[0]
        if self.gram_schmidt and self.rank > width:
            got = f"{self.rank} orthogonal directions for {site.modules[0]}, {width} wide"
            raise ValueError(f"peft.rank: got {got}; expected at most {width}")
        drawn = self.rank if self.gram_schmidt else -(-self.rank // 2)

        def start(key: jax.Array) -> jax.Array:
            u = jax.random.uniform(key, (width, drawn), minval=-1.0, maxval=1.0) / math.sqrt(drawn)
            return u if self.gram_schmidt else jnp.repeat(u, 2, axis=1)[:, : self.rank]

        return HRAWeight(site.base, site.draw(start), site.gate, gram_schmidt=self.gram_schmidt)


@weight
class HRAWeight(Weight):
    """``(x - ((x U) T') U') @ base``. u: [*stack, in, r], directions of any length; gate: [*stack]."""

    base: Any = parameter()
    u: jax.Array = trainable()
    gate: jax.Array
    gram_schmidt: bool = static(default=False)

    def __rmatmul__(self, x):
        u, t = compact(self.u, self.gram_schmidt)
        u, t = u.astype(x.dtype), (t * self.gate).astype(x.dtype)
        return (x - ((x @ u) @ t.T) @ u.T) @ self.base

    def axes(self, names):
        return {"base": names, "u": (*names[:-1], None), "gate": names[:-2]}


def compact(u: jax.Array, gram_schmidt: bool) -> tuple[jax.Array, jax.Array]:
    """U [in, r] of unit columns and T [r, r] with ``H_1 ... H_r = I - U T U'``, float32."""
    u = jnp.linalg.qr(u)[0] if gram_schmidt else u / jnp.linalg.norm(u, axis=0)
    inverse = jnp.triu(jnp.matmul(u.T, u, precision="highest"), 1) + jnp.eye(u.shape[1]) / 2
    return u, jax.scipy.linalg.solve_triangular(inverse, jnp.eye(u.shape[1]))


def config_of(config: Fields) -> HRA:
    """Our settings from peft's."""
    return HRA(rank=config.get("r", 8), gram_schmidt=bool(config.get("apply_GS")))


def describe(w: HRAWeight) -> Fields:
    """What all adapted modules have in common."""
    return {"r": w.u.shape[-1], "apply_GS": w.gram_schmidt}


def write(w: HRAWeight) -> Tensors:
    """One layer's directions."""
    return {"hra_u": np.asarray(w.u)}


def read(w: HRAWeight, tensors: Tensors) -> HRAWeight:
    """One layer with its directions."""
    return dataclasses.replace(w, u=tensors["hra_u"])


FORMAT = Format(
    peft_type="HRA",
    leaf=HRAWeight,
    fields=(
        "r", "apply_GS", "target_modules", "exclude_modules", "init_weights", "layers_to_transform", "layers_pattern",
    ),
    config=config_of,
    describe=describe,
    suffixes=("hra_u",),
    write=write,
    read=read,
)  # fmt: skip
