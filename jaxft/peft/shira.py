r"""SHiRA: a few entries of the weight itself, chosen at random, are trained.

.. math:: y = x (W + S), \qquad S \text{ zero but for } r\,(in + out) \text{ entries}

Bhardwaj et al. 2024, "Sparse High Rank Adapters", section 3 (arXiv:2406.13175), with its random mask. As many
parameters as LoRA of rank r has, at full rank. The entries are drawn one from each of as many equal stretches of the
flattened matrix: no two are the same, and none of the in * out candidates has to be held to choose them.

Unusual: x is multiplied by the dense S, put together from its entries and made again in the backward pass. With 2 r
entries in a column, gathering the inputs of each entry would hold 2 r * out numbers a token and move them through
memory one by one; the matrix product does not, and is the faster on any accelerator from about a hundred tokens on. Its
gradient is the dense one for a moment, of which the chosen entries are kept. S stays apart from W, so that on a
bfloat16 base a small entry is not lost in rounding.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import products
from jaxft.core.weight import Weight, parameter, trainable, weight
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.formats import Format
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class SHiRA(Targeted):
    """Trained entries of the weight. Default learning rate 5e-4."""

    rank: int = 32
    """Decides the number of entries, rank * (in + out): that of LoRA. It does not bound the rank of the update."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"peft.rank: got {self.rank}; expected at least 1")

    def wrap(self, site: Site) -> "SHiRAWeight":
        rows, columns = site.shape
        count = self.rank * (rows + columns)
        if count > rows * columns:
            raise ValueError(
                f"peft.rank: got {self.rank} for {site.name.module}, which asks for {count} entries of a matrix "
                f"[{rows}, {columns}]; expected at most {rows * columns // (rows + columns)}"
            )
        at_in, at_out = site.draw(lambda key: _places(key, rows, columns, count))
        return SHiRAWeight(site.base, jnp.zeros(at_in.shape), at_in, at_out, site.gate)


@weight
class SHiRAWeight(Weight):
    """``x @ base + x @ S``. values: [*stack, n], the entries of S at int32[*stack, n] of the input and of the output,
    in ascending order of (output, input) and no two the same."""

    base: Any = parameter()
    values: jax.Array = trainable()
    at_in: jax.Array
    at_out: jax.Array
    gate: jax.Array

    linear: ClassVar[tuple[str, ...]] = ("values",)

    def __rmatmul__(self, x):
        empty = jnp.zeros(self.shape[::-1], x.dtype)

        def sparse(values: jax.Array, at_in: jax.Array, at_out: jax.Array) -> jax.Array:
            places = empty.at[at_out, at_in]
            return places.set(values.astype(x.dtype), indices_are_sorted=True, unique_indices=True).T

        return x @ self.base + products.remade(x, sparse, self.values * self.gate, self.at_in, self.at_out)


def _places(key: jax.Array, rows: int, columns: int, count: int) -> tuple[jax.Array, jax.Array]:
    """(input, output) int32[count] of entries of one matrix, one from each of ``count`` equal stretches of it."""
    starts = np.arange(count + 1) * (rows * columns) // count
    offset = jax.random.randint(key, (count,), 0, np.diff(starts).astype(np.int32))
    out, at = (jnp.asarray(part[:-1], jnp.int32) for part in np.divmod(starts, rows))
    return (at + offset) % rows, out + (at + offset) // rows


def write(w: SHiRAWeight) -> Tensors:
    """One layer's entries and their places (output, input)."""
    return {"shira_weight": np.asarray(w.values), "shira_indices": np.stack([w.at_out, w.at_in]).astype(np.int32)}


def read(w: SHiRAWeight, tensors: Tensors) -> SHiRAWeight:
    """One layer with its entries. Raises AdapterError for places that are none, or not in order."""
    at_out, at_in = tensors["shira_indices"].astype(np.int64)
    rows, columns = w.base.shape
    flat = at_out * rows + at_in
    inside = (at_in >= 0) & (at_in < rows) & (at_out >= 0) & (at_out < columns)
    if not inside.all() or (np.diff(flat) <= 0).any():
        got, expected = "places outside the matrix, or not in order", f"ascending ones of a matrix [{columns}, {rows}]"
        raise AdapterError("shira_indices", got, expected, "The file is damaged, or was made for another model.")
    return dataclasses.replace(w, values=tensors["shira_weight"], at_in=at_in, at_out=at_out)


FORMAT = Format(
    peft_type="SHIRA",
    leaf=SHiRAWeight,
    fields=("r", "mask_type", "random_seed", "target_modules", "fan_in_fan_out", "init_weights"),
    config=lambda config: SHiRA(rank=config.get("r", 32)),
    describe=lambda w: {},
    suffixes=("shira_weight", "shira_indices"),
    write=write,
    read=read,
    values=lambda w: {"r": w.values.shape[-1] // sum(w.base.shape)},
    biases=False,
)  # fmt: skip
