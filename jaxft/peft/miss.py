r"""MiSS: every shard of r input features shares one trained block, so the shards are added up before it.

.. math:: y = x W + \Big(\sum_j x_{[j r, (j+1) r)}\Big) D, \qquad D \in R^{r \times out}

Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure"
(arXiv:2409.15371; first called Bone). Where r does not divide in, the last shard is filled with zeros. r * out
parameters a module; in the variant ``mini`` D is one block [r, mini_rank] repeated along the output, r * mini_rank.

In the variant ``bat`` the update depends on the weight: with W cut into r x r blocks W_ba (b of the input, a of the
output), Delta W_ba = M_a^T W_ba + M_a^T, M being [out / r, r, r]: r * out parameters. That needs the dense W and a
dense Delta W, which are made again in the backward pass instead of kept.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxft.core import products, verbs
from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft.formats import Fields, Format
from jaxft.peft.sites import Site, Targeted

Variant = Literal["balance", "bat", "mini"]


@dataclass(frozen=True)
class MiSS(Targeted):
    """A block that all shards of the input share. Default learning rate 2e-4."""

    rank: int = 64
    """Size r of a shard."""
    variant: Variant = "balance"
    """balance: a block as wide as the output; mini: one repeated along it; bat: an update made of block and weight."""
    mini_rank: int = 1
    """Width of the repeated block of mini; it divides the output."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of the adapter while training; bat has none."""

    def __post_init__(self) -> None:
        if self.variant not in ("balance", "bat", "mini"):
            raise ValueError(f"peft.variant: got {self.variant!r}; expected balance, bat or mini")
        for field, good in {
            "rank": self.rank >= 1,
            "mini_rank": self.mini_rank >= 1,
            "dropout": 0.0 <= self.dropout < 1.0 and not (self.dropout and self.variant == "bat"),
        }.items():
            if not good:
                expected = "rank >= 1, mini_rank >= 1, 0 <= dropout < 1 and no dropout with bat"
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected {expected}")

    def wrap(self, site: Site) -> "MiSSWeight":
        (rows, columns), r, module = site.shape, self.rank, site.name.module
        if r > rows:
            raise ValueError(f"peft.rank: got {r} for {module}; expected at most {rows}, its input features")
        if self.variant == "mini" and columns % self.mini_rank:
            expected = f"a divisor of {columns}, its output features"
            raise ValueError(f"peft.mini_rank: got {self.mini_rank} for {module}; expected {expected}")
        if self.variant == "bat" and (rows % r or columns % r):
            raise ValueError(f"peft.rank: got {r} for {module}; expected a divisor of both {rows} and {columns}")
        shape = {"balance": (r, columns), "mini": (r, self.mini_rank), "bat": (columns // r, r, r)}[self.variant]
        block = jnp.zeros((*site.layers.shape, *shape))
        return MiSSWeight(site.base, block, site.gate, rate=self.dropout, variant=self.variant)


@weight
class MiSSWeight(Weight):
    """``x @ base`` and the shards of x, added up, times ``block``: [*stack, r, out], or of mini [*stack, r, mini_rank].

    Of bat: block [*stack, out / r, r, r], and ``x @ (base + delta(base, block))``."""

    base: Any = parameter()
    block: jax.Array = trainable()
    gate: jax.Array
    key: jax.Array | None = None
    rate: float = static(default=0.0)
    variant: Variant = static(default="balance")

    linear: ClassVar[tuple[str, ...]] = ("block",)

    @property
    def shard(self) -> int:
        """Size r of a shard."""
        return self.block.shape[-1] if self.variant == "bat" else self.block.shape[-2]

    def __rmatmul__(self, x):
        block = (self.block * self.gate).astype(x.dtype)
        if self.variant == "bat":
            return x @ self.base + products.remade(x, _delta, self.base, block)
        rows, columns = self.shape
        shards = -(-rows // self.shard)
        dropped = products.dropped(x, self.key, self.rate)
        filled = jnp.pad(dropped, [(0, 0)] * (x.ndim - 1) + [(0, shards * self.shard - rows)])
        low = filled.reshape(*x.shape[:-1], shards, self.shard).sum(-2)
        return x @ self.base + jnp.tile(low @ block, columns // block.shape[-1])


def _delta(base: Any, block: jax.Array) -> jax.Array:
    """Bat's update [in, out] of one layer: of each r x r block of the weight, and of the trained one of its column."""
    matrix, r = verbs.dense(base).astype(block.dtype), block.shape[-1]
    blocks = matrix.reshape(-1, r, matrix.shape[1] // r, r)
    delta = jnp.einsum("bqap,aqs->bsap", blocks, block) + block.transpose(2, 0, 1)
    return delta.reshape(matrix.shape)


def config_of(config: Fields) -> MiSS:
    """Our settings from peft's."""
    init = config.get("init_weights", True)
    return MiSS(
        rank=config.get("r", 64),
        variant=init if init in ("bat", "mini") else "balance",
        mini_rank=config.get("mini_r", 1),
        dropout=0.0 if init == "bat" else float(config.get("miss_dropout", 0.0)),
    )


def describe(w: MiSSWeight) -> Fields:
    """What all adapted modules have in common."""
    init = True if w.variant == "balance" else w.variant
    mini = w.block.shape[-1] if w.variant == "mini" else 1
    return {"r": w.shard, "init_weights": init, "mini_r": mini, "miss_dropout": w.rate}


FORMAT = Format(
    peft_type="MISS",
    leaf=MiSSWeight,
    fields=(
        "r", "miss_dropout", "mini_r", "target_modules", "exclude_modules", "init_weights", "layers_to_transform",
        "layers_pattern",
    ),
    config=config_of,
    describe=describe,
    suffixes=("miss_block",),
    write=lambda w: {"miss_block": w.block},
    read=lambda w, tensors: dataclasses.replace(w, block=tensors["miss_block"]),
)  # fmt: skip
