r"""RandLora: a full-rank update from a sum of frozen random low-rank matrices with trained diagonal scales.

.. math:: \Delta W = \frac{\alpha}{r} \sum_{j=1}^{n} B_j \Lambda_j A \Gamma_j,
    \qquad n = \lceil \min(in, out) / r \rceil

Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models" (arXiv:2502.00987).
Trained are the diagonals Lambda (n of size r) and Gamma (n of size min(in, out)): n (r + min(in, out)) parameters a
module, so a smaller r trains more. ``A`` [r, smallest] and ``B`` [largest, n, r] are as large as any module needs, one
buffer for all modules and layers, and saved with the adapter. A lies at the smaller side: the input's if in <= out.

Unusual: the sum runs over r n pairs, and peft pairs them crosswise (it flattens A as [r, n] but B as [n, r]), which is
kept here. A Gamma_j, a matrix of min(in, out)^2, is made again in the backward pass instead of kept. peft also writes A
and B once more for every module; here they are written once, which peft loads, while it warns of the missing copies.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxft.core import products
from jaxft.core.weight import Shared, Weight, parameter, static, trainable, weight
from jaxft.peft import disk, formats
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.formats import Fields, Format
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class RandLora(Targeted):
    """Trained diagonals on shared random matrices. Default learning rate 1e-4."""

    rank: int = 32
    """Rank r of each random matrix; the smaller, the more of them there are, and the more is trained."""
    alpha: float = 640.0
    """Numerator of the scale alpha / rank."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of the adapter while training."""
    basis: Literal["dense", "sparse", "very_sparse"] = "dense"
    """The random numbers: uniform; -1, 0 or 1 of which 2/3 are 0; or of which all but 1/sqrt(smallest) are 0."""

    def __post_init__(self) -> None:
        for field, good in {"rank": self.rank >= 1, "dropout": 0.0 <= self.dropout < 1.0}.items():
            if not good:
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected rank >= 1, 0 <= dropout < 1")
        if self.basis not in ("dense", "sparse", "very_sparse"):
            raise ValueError(f"peft.basis: got {self.basis!r}; expected dense, sparse or very_sparse")

    def share(self, shapes: Sequence[tuple[int, int]], key: jax.Array) -> tuple[Shared, Shared]:
        a, b = _bases(shapes, self.rank)
        one, two = jax.random.split(key)
        zeros = {"dense": None, "sparse": 2 / 3, "very_sparse": 1 - a[-1] ** -0.5}[self.basis]
        return Shared(_draw(one, a, zeros)), Shared(_draw(two, b, zeros))

    def wrap(self, site: Site) -> "RandLoraWeight":
        smallest = min(site.shape)
        count = -(-smallest // self.rank)
        stack = site.layers.shape
        a, b = site.shared
        return RandLoraWeight(
            base=site.base,
            lambdas=jnp.zeros((*stack, self.rank, count)),
            gammas=jnp.full((*stack, count, smallest), 1 / max(count, smallest)),
            a=a,
            b=b,
            alpha=jnp.asarray(site.values(self.alpha)),
            gate=site.gate,
            rate=self.dropout,
        )


@weight
class RandLoraWeight(Weight):
    """``x @ base + alpha / r * x @ (sum of scaled bases)``. lambdas: [*stack, r, n]; gammas: [*stack, n, min(in, out)].

    Frozen, of the whole model: a [r, 1, smallest], b [largest, n of the largest, r], as peft holds them. alpha:
    float32[*stack]."""

    base: Any = parameter()
    lambdas: jax.Array = trainable()
    gammas: jax.Array = trainable()
    a: Shared
    b: Shared
    alpha: jax.Array
    gate: jax.Array
    key: jax.Array | None = None
    rate: float = static(default=0.0)

    linear: ClassVar[tuple[str, ...]] = ("lambdas",)

    def __rmatmul__(self, x):
        (rows, columns), (rank, count) = self.shape, self.lambdas.shape
        scales = (self.lambdas * (self.alpha * self.gate / rank)).reshape(-1).astype(x.dtype)
        a, b = self.a.value[:, 0, : min(rows, columns)], self.b.value

        def large(b: jax.Array) -> jax.Array:
            return b[: max(rows, columns), :count].reshape(-1, count * rank)

        low = products.dropped(x, self.key, self.rate)
        if rows <= columns:
            low = products.remade(low, lambda a, g: products.by_rows(a.T, g.T), a, self.gammas) * scales
            return x @ self.base + products.remade(low, lambda b: large(b).T, b)
        low = products.remade(low, large, b) * scales
        return x @ self.base + products.remade(low, products.by_columns, a, self.gammas)


def _bases(shapes: Sequence[tuple[int, int]], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and of B for modules of these (in, out)."""
    rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
    smallest, largest = sorted((rows, columns))
    return (rank, 1, smallest), (largest, -(-smallest // rank), rank)


def _draw(key: jax.Array, shape: tuple[int, ...], zeros: float | None) -> jax.Array:
    """Random numbers of deviation 1: uniform, or -1, 0 and 1 with a fraction of ``zeros``."""
    array = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    if zeros is not None:
        array = jnp.where(jnp.abs(array) < zeros, 0.0, jnp.sign(array))
    return array / array.std()


A, B = "/base_model.randlora_A", "/base_model.randlora_B"


def stored(where: object, config: Fields, tensors: Tensors, shapes: Sequence[tuple[int, int]]) -> tuple[Shared, Shared]:
    """The random matrices; peft stores them once more with every module. Raises AdapterError if they are missing."""
    if not config.get("save_projection", True) and A not in tensors:
        remedy = (
            "peft draws them again in bfloat16 or float16, as the machine at hand has it, so their seed does not say "
            "what they were. Train with save_projection=True."
        )
        raise AdapterError(where, "save_projection false, no random matrices", f"{A[1:]} and {B[1:]}", remedy)
    both = zip((A, B), _bases(shapes, config.get("r", 32)), strict=True)
    a, b = (Shared(jnp.asarray(disk.take(where, tensors, name, shape))) for name, shape in both)
    for copy in [name for name in tensors if name.endswith((".randlora_A", ".randlora_B"))]:
        del tensors[copy]
    return a, b


def config_of(config: Fields) -> RandLora:
    """Our settings from peft's."""
    dropout = float(config.get("randlora_dropout", 0.0))
    return RandLora(rank=config.get("r", 32), alpha=config.get("randlora_alpha", 640), dropout=dropout)


def describe(w: RandLoraWeight) -> Fields:
    """What all adapted modules have in common."""
    return {"r": w.lambdas.shape[-2], "randlora_dropout": w.rate, "save_projection": True}


FORMAT = Format(
    peft_type="RANDLORA",
    leaf=RandLoraWeight,
    fields=(
        "r", "target_modules", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout",
        "fan_in_fan_out", "randlora_alpha", "init_weights", "layers_to_transform", "layers_pattern",
    ),
    config=config_of,
    describe=describe,
    suffixes=("randlora_lambda", "randlora_gamma"),
    write=lambda w: {"randlora_lambda": w.lambdas, "randlora_gamma": w.gammas},
    read=lambda w, tensors: dataclasses.replace(
        w, lambdas=tensors["randlora_lambda"], gammas=tensors["randlora_gamma"]
    ),
    values=lambda w: {"randlora_alpha": float(w.alpha)},
    common=lambda found, names: dict(zip((A, B), formats.in_common(found, "a", "b"), strict=True)),
    shared=stored,
)  # fmt: skip
