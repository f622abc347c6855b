r"""VeRA: one pair of frozen random matrices for the whole model; each module trains two vectors that scale them.

.. math:: y = x W + \big((x A) \circ d\big) B \circ b

Kopiczko, Blankevoort, Asano 2023, "VeRA: Vector-based Random Matrix Adaptation", eq. 2 (arXiv:2310.11454). Trained
are ``d`` [r] and ``b`` [out]: r + out parameters a module. ``A`` and ``B`` are as large as the largest module needs,
one buffer for all modules and layers, of which each uses the first rows; they are saved with the adapter. Where peft
saved only their seed, they are drawn as torch draws them.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxft.core import products
from jaxft.core.weight import Shared, Weight, parameter, static, trainable, weight
from jaxft.peft import disk, formats, torch_draws
from jaxft.peft.disk import Tensors
from jaxft.peft.formats import Fields, Format
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class VeRA(Targeted):
    """Trained vectors on shared random matrices. Default learning rate 4e-3."""

    rank: int = 256
    """Rank r of the shared matrices: larger than LoRA's, as a module trains only r + out parameters."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of the adapter while training."""
    d_initial: float = 0.1
    """What d, the scales of the rank, start at; b, those of the output, start at zero."""

    def __post_init__(self) -> None:
        for field, good in {"rank": self.rank >= 1, "dropout": 0.0 <= self.dropout < 1.0}.items():
            if not good:
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected rank >= 1, 0 <= dropout < 1")

    def share(self, shapes: Sequence[tuple[int, int]], key: jax.Array) -> tuple[Shared, Shared]:
        (a, a_bound), (b, b_bound) = _projections(shapes, self.rank)
        one, two = jax.random.split(key)
        return (
            Shared(jax.random.uniform(one, a, minval=-a_bound, maxval=a_bound)),
            Shared(jax.random.uniform(two, b, minval=-b_bound, maxval=b_bound)),
        )

    def wrap(self, site: Site) -> "VeRAWeight":
        d_shape, b_shape = (*site.layers.shape, self.rank), (*site.layers.shape, site.shape[1])
        projections = dict(zip(("down", "up"), site.shared, strict=True))
        d, b = jnp.full(d_shape, self.d_initial), jnp.zeros(b_shape)
        return VeRAWeight(base=site.base, d=d, b=b, **projections, gate=site.gate, rate=self.dropout)


@weight
class VeRAWeight(Weight):
    """``x @ base + ((x @ down.T) * d) @ up.T * b``. d: [*stack, r]; b: [*stack, out].

    Frozen, of the whole model: down [r, largest in], up [largest out, r], as peft holds them."""

    base: Any = parameter()
    d: jax.Array = trainable()
    b: jax.Array = trainable()
    down: Shared
    up: Shared
    gate: jax.Array
    key: jax.Array | None = None
    rate: float = static(default=0.0)

    linear: ClassVar[tuple[str, ...]] = ("b",)

    def __rmatmul__(self, x):
        rows, columns = self.shape
        down, up = self.down.value[:, :rows], self.up.value[:columns]
        low = products.dropped(x, self.key, self.rate) @ down.astype(x.dtype).T
        low = low * (self.d * self.gate).astype(x.dtype)
        return x @ self.base + (low @ up.astype(x.dtype).T) * self.b.astype(x.dtype)


def _projections(shapes: Sequence[tuple[int, int]], rank: int) -> list[tuple[tuple[int, int], float]]:
    """Shape of A (as torch has it), and of B, for modules of these (in, out), each with the bound of its numbers."""
    rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
    return [
        (shape, math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))) for shape in ((rank, rows), (columns, rank))
    ]


A, B = "/base_model.vera_A", "/base_model.vera_B"


def stored(where: object, config: Fields, tensors: Tensors, shapes: Sequence[tuple[int, int]]) -> tuple[Shared, Shared]:
    """The matrices that were saved, or those that torch draws from the seed."""
    draws = _projections(shapes, config.get("r", 256))
    if config.get("save_projection", True) or A in tensors:
        a, b = (disk.take(where, tensors, name, shape) for name, (shape, _) in zip((A, B), draws, strict=True))
    else:
        of = torch_draws.generator(config.get("projection_prng_key", 0))
        a, b = (torch_draws.uniform(of, shape, bound) for shape, bound in draws)
    return Shared(jnp.asarray(a)), Shared(jnp.asarray(b))


FORMAT = Format(
    peft_type="VERA",
    leaf=VeRAWeight,
    fields=(
        "r", "target_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out",
        "init_weights", "layers_to_transform", "layers_pattern",
    ),
    config=lambda config: VeRA(rank=config.get("r", 256), dropout=float(config.get("vera_dropout", 0.0))),
    describe=lambda w: {"r": w.d.shape[-1], "vera_dropout": w.rate, "save_projection": True},
    suffixes=("vera_lambda_b", "vera_lambda_d"),
    write=lambda w: {"vera_lambda_b": w.b, "vera_lambda_d": w.d},
    read=lambda w, tensors: dataclasses.replace(w, b=tensors["vera_lambda_b"], d=tensors["vera_lambda_d"]),
    common=lambda found, names: dict(zip((A, B), formats.in_common(found, "down", "up"), strict=True)),
    shared=stored,
)  # fmt: skip
