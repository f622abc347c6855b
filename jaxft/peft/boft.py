r"""BOFT: the input is rotated in blocks several times, its halves shuffled in between like an FFT's butterfly.

.. math:: y = (x\,B_m \cdots B_1\,W) \odot s, \qquad B_i = P_i\,\mathrm{diag}(R_{i1}, \dots, R_{in})\,P_i^T, \qquad
          R_{ij} = (I - S_{ij})(I + S_{ij})^{-1}

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", eq. 4 (arXiv:2311.06243), with
the trained output scale of peft (without the bias). :math:`S = (Q - Q^T)/2` is made of a whole b x b matrix Q, so a
module trains m in b + out numbers. Factor i pairs half blocks that are 2^(i-1) apart: a reshape, never a matrix.

peft needs its CUDA extension for more than one factor; without it, it trains one whatever its config says.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft import oft
from jaxft.peft.disk import Tensors
from jaxft.peft.formats import Fields, Format
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class BOFT(Targeted):
    """Butterfly orthogonal finetuning. Default learning rate 1e-3."""

    block_size: int | None = None
    """Width of a rotated block, a divisor of every module's width; default 4."""
    blocks: int | None = None
    """Number of blocks of each module, instead of their size."""
    factors: int = 1
    """Butterfly factors m: b 2^(m-1) features mix. Above 1, block sizes must be even and numbers divide by 2^(m-1)."""
    dropout: float = 0.0
    """Share of the blocks of one random factor that do not turn in a training step."""

    def __post_init__(self) -> None:
        if self.block_size is not None and self.blocks is not None:
            got = f"{self.blocks} besides peft.block_size={self.block_size}"
            raise ValueError(f"peft.blocks: got {got}; expected one of the two")
        checks = {
            "block_size": (self.block_size is None or self.block_size >= 2, "at least 2"),
            "blocks": (self.blocks is None or self.blocks >= 1, "at least 1"),
            "factors": (self.factors >= 1, "at least 1"),
            "dropout": (0.0 <= self.dropout < 1.0, "0 <= dropout < 1"),
        }
        for field, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected {expected}")

    def wrap(self, site: Site) -> "BOFTWeight":
        width, out = site.shape
        number, size = self.blocks_of(site.modules[0], width)
        return BOFTWeight(
            base=site.base,
            rotation=jnp.zeros((*site.layers.shape, self.factors, number, size, size)),
            scale=jnp.ones((*site.layers.shape, out)),
            gate=site.gate,
            rate=self.dropout,
            by_number=self.blocks is not None,
        )

    def blocks_of(self, module: str, width: int) -> tuple[int, int]:
        """(number, size) of the blocks of a module; raises ValueError where they do not fit."""
        field, wanted = ("block_size", self.block_size or 4) if self.blocks is None else ("blocks", self.blocks)
        number, size = (width // wanted, wanted) if self.blocks is None else (wanted, width // wanted)
        apart = 2 ** (self.factors - 1)
        fits = width % wanted == 0 and size >= 2
        if not fits or (self.factors > 1 and (size % 2 or number % apart)):
            also = f", the size even and the number a multiple of {apart}" if self.factors > 1 else ""
            raise ValueError(
                f"peft.{field}: got {wanted} for {module}, {width} wide, with peft.factors={self.factors}; expected "
                f"blocks of at least 2 that fill the width{also}. Or leave the module out with peft.exclude."
            )
        return number, size


@weight
class BOFTWeight(Weight):
    """``(x turned) @ base * scale``. rotation: [*stack, m, blocks, b, b], Q; scale: [*stack, out]; gate: [*stack].

    ``by_number``: whether the config gave the number of blocks.
    """

    base: Any = parameter()
    rotation: jax.Array = trainable()
    scale: jax.Array = trainable()
    gate: jax.Array
    key: jax.Array | None = None
    rate: float = static(default=0.0)
    by_number: bool = static(default=False)

    def __rmatmul__(self, x):
        turn = turns(self.rotation) * self.gate
        if self.key is not None and self.rate > 0.0:
            turn = jnp.where(kept(self.key, self.rate, *turn.shape[:2])[..., None, None], turn, 0.0)
        for i in reversed(range(turn.shape[0])):
            x = butterfly(x, turn[i].astype(x.dtype), 2**i)
        y = x @ self.base
        return (y.astype(jnp.float32) * jnp.where(self.gate > 0, self.scale, 1.0)).astype(y.dtype)


@jax.checkpoint
def turns(rotation: jax.Array) -> jax.Array:
    """``R - I`` of each block, float32[m, n, b, b]."""
    with jax.default_matmul_precision("highest"):
        return oft.cayley((rotation - jnp.swapaxes(rotation, -1, -2)) / 2, None)


def kept(key: jax.Array, rate: float, factors: int, blocks: int) -> jax.Array:
    """bool[m, n]: False for ``int(rate n)`` random blocks of one random factor."""
    one, order = jax.random.split(key)
    dropped = jax.random.permutation(order, blocks) < int(rate * blocks)
    return ~(dropped & (jnp.arange(factors) == jax.random.randint(one, (), 0, factors))[:, None])


def butterfly(x: jax.Array, turn: jax.Array, apart: int) -> jax.Array:
    """``x`` with blocks turned that are two half blocks, ``apart`` half blocks from each other: see `oft.rotate`."""
    if apart == 1:
        return oft.rotate(x, turn)
    half = turn.shape[-1] // 2
    paired = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2, apart, half), -3, -2)
    turned = oft.rotate(paired.reshape(x.shape), turn).reshape(paired.shape)
    return jnp.swapaxes(turned, -3, -2).reshape(x.shape)


def config_of(config: Fields) -> BOFT:
    """Our settings from peft's."""
    return BOFT(
        block_size=config.get("boft_block_size", 4) or None,
        blocks=config.get("boft_block_num") or None,
        factors=config.get("boft_n_butterfly_factor", 1),
        dropout=float(config.get("boft_dropout", 0.0)),
    )


def describe(w: BOFTWeight) -> Fields:
    """What all adapted modules have in common."""
    factors, number, size = w.rotation.shape[-4:-1]
    blocks = {"boft_block_size": 0 if w.by_number else size, "boft_block_num": number if w.by_number else 0}
    return blocks | {"boft_n_butterfly_factor": factors, "boft_dropout": w.rate}


def write(w: BOFTWeight) -> Tensors:
    """One layer's numbers."""
    return {"boft_R": np.asarray(w.rotation), "boft_s": np.asarray(w.scale)[:, None]}


def read(w: BOFTWeight, tensors: Tensors) -> BOFTWeight:
    """One layer with its numbers."""
    return dataclasses.replace(w, rotation=tensors["boft_R"], scale=tensors["boft_s"][:, 0])


def count_factors(where: object, config: Fields, tensors: Tensors, params: tree.Params) -> Fields:
    """The factors that were trained: without its CUDA extension, peft trains one whatever the config says."""
    del where, params
    made = {array.shape[0] for name, array in tensors.items() if name.endswith("boft_R") and array.ndim == 4}
    return config | ({"boft_n_butterfly_factor": made.pop()} if len(made) == 1 else {})


FORMAT = Format(
    peft_type="BOFT",
    leaf=BOFTWeight,
    fields=(
        "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "target_modules",
        "exclude_modules", "fan_in_fan_out", "init_weights", "layers_to_transform", "layers_pattern",
    ),
    config=config_of,
    describe=describe,
    suffixes=("boft_R", "boft_s"),
    write=write,
    read=read,
    prepare=count_factors,
)  # fmt: skip
