r"""FourierFT: a few trained entries of the update's spectrum.

.. math:: \Delta W = \alpha\, \mathrm{Re}\big(\mathrm{IDFT}_2(F)\big) =
    \frac{\alpha}{in \cdot out} \sum_{k=1}^{n} c_k \cos 2\pi \Big(\frac{v_k i}{in} + \frac{u_k o}{out}\Big)_{i, o}

Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", eqs. 2-4 (arXiv:2405.03003). F is
zero but for the n numbers ``c``, all that trains: n parameters a module. Their places (u, v) are the first n of a
random order of all entries, drawn from a seed as torch draws it, and the same for all modules of one shape.

Unusual: Delta W is never formed. The cosine of a sum makes it a product of rank 2 n whose factors are tables of cosines
and sines, made again in the backward pass. So a token takes 4 n (in + out) operations, against 2 in * out for a dense
Delta W, which would also need a two-dimensional transform and a dense gradient in every layer; at n = 1000 that is even
at width 4096, and less above it. Transforming x instead (FFT, the n entries, inverse FFT) takes the fewest operations,
but in complex float32 at full width, and none of them on a matrix unit.
peft starts ``c`` normal. Here it starts at zero, as the update is linear in it: the adapted model starts as the base.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import products
from jaxft.core.weight import Shared, Weight, parameter, static, trainable, weight
from jaxft.peft import torch_draws
from jaxft.peft.formats import Fields, Format, padded
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class FourierFT(Targeted):
    """Trained entries of the spectrum of the update. Default learning rate 3e-3."""

    frequencies: int = 1000
    """Number n of trained entries of a module."""
    scale: float = 150.0
    """What the update is multiplied by."""
    seed: int = 777
    """Decides the places of the entries."""
    init: Literal["zero", "normal"] = "zero"
    """What the entries start at; normal as in peft, where the adapted model does not start as the base."""
    frequencies_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Numbers of entries that differ: a regex for the end of a module name to its number."""

    patterns: ClassVar[tuple[str, ...]] = ("frequencies_pattern",)

    def __post_init__(self) -> None:
        if self.frequencies < 1:
            raise ValueError(f"peft.frequencies: got {self.frequencies}; expected at least 1")
        if self.init not in ("zero", "normal"):
            raise ValueError(f"peft.init: got {self.init!r}; expected zero or normal")

    def wrap(self, site: Site) -> "FourierFTWeight":
        counts = site.values(self.frequencies, self.frequencies_pattern, np.int32)
        (rows, columns), most = site.shape, int(counts.max())
        if most > rows * columns:
            raise ValueError(
                f"peft.frequencies: got {most} for {site.name.module}, whose spectrum [{rows}, {columns}] has "
                f"{rows * columns} entries; expected at most that many. Give it fewer with peft.frequencies_pattern."
            )
        places = torch_draws.permutation(self.seed, rows * columns, most)
        spectrum = jnp.zeros((*counts.shape, most))
        if self.init == "normal":
            spectrum = jnp.where(np.arange(most) < counts[..., None], jax.random.normal(site.key, spectrum.shape), 0.0)
        return FourierFTWeight(
            base=site.base,
            spectrum=spectrum,
            places=Shared(jnp.asarray(np.stack(np.divmod(places, rows)), jnp.int32)),
            count=jnp.asarray(counts),
            scale=jnp.asarray(site.values(self.scale)),
            gate=site.gate,
            seed=self.seed,
        )


@weight
class FourierFTWeight(Weight):
    """``x @ base + scale * x @ Re(ifft2(F))``. spectrum: [*stack, n], the entries of F at ``places``.

    places: int32[2, n], (of the output, of the input); count: int32[*stack], how many of them a layer has."""

    base: Any = parameter()
    spectrum: jax.Array = trainable()
    places: Shared
    count: jax.Array
    scale: jax.Array
    gate: jax.Array
    seed: int = static(default=777)

    linear: ClassVar[tuple[str, ...]] = ("spectrum",)

    def __rmatmul__(self, x):
        rows, columns = self.shape
        out_places, in_places = self.places.value
        real = jnp.arange(in_places.size) < self.count
        c = jnp.where(real, self.spectrum, 0.0) * (self.gate * self.scale / (rows * columns))
        low = products.remade(x, functools.partial(_waves, rows), in_places)
        low = low * jnp.concatenate([c, -c]).astype(x.dtype)
        return x @ self.base + products.remade(low, lambda at: _waves(columns, at).T, out_places)


def _waves(size: int, places: jax.Array) -> jax.Array:
    """float32[size, 2 n]: cosines, then sines, of 2 pi i p / size for all i < size, of each place p of int32[n].

    ``i p`` is reduced exactly, in two halves that int32 holds for sizes up to 700,000."""
    i = jnp.arange(size, dtype=jnp.int32)[:, None]
    turns = (i // 256 * (places * 256 % size) + i % 256 * places) % size
    angle = turns.astype(jnp.float32) * np.float32(2 * np.pi / size)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def config_of(config: Fields) -> FourierFT:
    """Our settings from peft's."""
    return FourierFT(
        frequencies=config.get("n_frequency", 1000),
        scale=config.get("scaling", 150.0),
        seed=config.get("random_loc_seed", 777),
        frequencies_pattern=config.get("n_frequency_pattern") or {},
    )


FORMAT = Format(
    peft_type="FOURIERFT",
    leaf=FourierFTWeight,
    fields=(
        "n_frequency", "scaling", "random_loc_seed", "fan_in_fan_out", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "n_frequency_pattern", "init_weights",
    ),
    config=config_of,
    describe=lambda w: {"random_loc_seed": w.seed},
    suffixes=("fourierft_spectrum",),
    write=lambda w: {"fourierft_spectrum": np.asarray(w.spectrum)[: int(w.count)]},
    read=lambda w, tensors: dataclasses.replace(w, spectrum=padded(tensors["fourierft_spectrum"], w.spectrum)),
    values=lambda w: {"n_frequency": int(w.count), "scaling": float(w.scale)},
    patterned={"n_frequency": "n_frequency_pattern"},
)  # fmt: skip
