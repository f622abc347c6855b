r"""DoRA: the direction of each column of a weight is adapted by LoRA, and its length is trained apart.

.. math:: W' = m \circ \frac{V}{\lVert V \rVert_c}, \qquad V = W + s A B

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5 (arXiv:2402.09353), with the norm of each column
(output feature; of an embedding, each feature over the vocabulary) held constant in the backward pass, as in its
section 4.3. r (in + out) + out parameters. m begins as the norms of V, so that the map begins as the base.

Unusual: no dense V is made. With the norms of W measured once,

.. math:: \lVert V \rVert_c^2 = \lVert W \rVert_c^2 + 2 s \sum_i (A^\top W)_{ic} B_{ic}
    + s^2 \sum_i (A^\top A B)_{ic} B_{ic}

costs a product of r rows with the base, whatever weight that is. In training, dropout acts as in peft: with
:math:`f = m / \lVert V \rVert_c` and x' the dropped input, :math:`y = x W + (f - 1) \circ x' W + f \circ s (x' A) B`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import verbs
from jaxft.core.weight import Weight, trainable, weight
from jaxft.peft import lora_hf, lora_init
from jaxft.peft.disk import Tensors
from jaxft.peft.formats import Fields
from jaxft.peft.lora import LoRA, LoRAWeight
from jaxft.peft.sites import Site


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA with a trained length for each output feature. Default learning rate 2e-4. Every other setting is LoRA's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise ValueError(
                "peft.lora_bias: got true; expected false: DoRA's length would scale it (peft has none too)"
            )

    def wrap(self, site: Site) -> Weight:
        if site.follows:
            raise ValueError(
                f"peft.ensure_weight_tying: {site.name.module} has one length a feature, and the head that follows it "
                "one a token; expected false with DoRA on an embedding. Leave it out, or use LoRA."
            )
        fields = self.fields(site)
        # another adapter below goes on changing, and its norms with it
        fixed = not (isinstance(site.base, Weight) and site.base.adapter)
        site = site._replace(base=fields["base"])
        norms = lora_init.by_layer(site, lambda index, key: _squares(site.base[index])) if fixed else None
        w = DoRAWeight(**fields, norms=norms)
        return dataclasses.replace(w, magnitude=lora_init.by_layer(site, lambda index, key: _lengths(w[index])))


@jax.jit
def _squares(w: Any) -> jax.Array:
    """Squared norms of the columns of a weight [..., in, out]: float32[..., out]."""
    return jnp.sum(jnp.square(verbs.dense(w).astype(jnp.float32)), axis=-2)


@jax.jit
def _lengths(w: LoRAWeight) -> jax.Array:
    return jnp.sqrt(_squares(LoRAWeight._matrix(w)))


@weight
class DoRAWeight(LoRAWeight):
    """As LoRAWeight, each output feature scaled to the length ``magnitude`` [*stack, out].

    ``norms``: squared norms of the base's columns, float32[*stack, out]; None where they change."""

    magnitude: Any = trainable(default=None)
    norms: jax.Array | None = None

    def upon(self, base):
        return dataclasses.replace(self, base=base, norms=None)

    def _norms(self, dtype: Any) -> jax.Array:
        """The norms of V's columns, float32[*stack, out], a constant to differentiation.

        ``dtype``: of the product with the base."""
        a, b, base = self.a, self.b, self.base
        if self.a0 is not None:
            a, b = jnp.concatenate([a, self.a0], -1), jnp.concatenate([b, -self.b0], -2)
        a, b, base, scale = jax.lax.stop_gradient((a, b, base, self.scale[..., None, None]))
        across = jnp.swapaxes(a, -1, -2)
        cross = (across.astype(dtype) @ base).astype(jnp.float32)
        squares = _squares(base) if self.norms is None else self.norms
        squares = squares + jnp.sum(scale * b * (2 * cross + scale * ((across @ a) @ b)), axis=-2)
        return jnp.sqrt(jnp.maximum(squares, 0.0))

    def _factor(self, lengths: jax.Array) -> jax.Array:
        """What V's columns are multiplied by: 1 where the layer is not adapted, or a column is zero."""
        real = (self.rank[..., None] > 0) & (lengths > 0)
        return jnp.where(real, self.magnitude / jnp.where(real, lengths, 1.0), 1.0)

    def _apply(self, x, dot, each):
        factor = each(self._factor(self._norms(x.dtype))).astype(x.dtype)
        base, dropped = self._frozen(x, dot, each), self._dropped(x)
        if dropped is x:
            return factor * (base + self._delta(x, dot, each))
        return base + (factor - 1) * self._frozen(dropped, dot, each) + factor * self._delta(dropped, dot, each)

    def take(self, ids):
        rows = super().take(ids)
        return rows * self._factor(self._norms(rows.dtype)).astype(rows.dtype)

    def unembed(self, x):
        return verbs.unembed(self.base, x)

    def _matrix(self):
        v = super()._matrix()
        return v * self._factor(jnp.sqrt(_squares(jax.lax.stop_gradient(v))))[..., None, :]

    def axes(self, names):
        along = (*names[:-2], names[-1])
        return {**super().axes(names), "magnitude": along, "norms": along}


def config_of(config: Fields) -> DoRA:
    """Our settings from peft's."""
    return DoRA(**lora_hf.settings(config))


def describe(w: DoRAWeight) -> Fields:
    """What all adapted modules have in common."""
    return {**lora_hf.describe(w), "use_dora": True}


def write(w: DoRAWeight) -> Tensors:
    """One layer's factors and lengths."""
    return {**lora_hf.write(w), "lora_magnitude_vector": np.asarray(w.magnitude)}


def read(w: DoRAWeight, tensors: Tensors) -> DoRAWeight:
    """One layer with its factors and lengths."""
    return dataclasses.replace(lora_hf.read(w, tensors), magnitude=tensors["lora_magnitude_vector"])


FORMAT = dataclasses.replace(
    lora_hf.FORMAT,
    leaf=DoRAWeight,
    fields=(*lora_hf.FORMAT.fields, "use_dora"),
    config=config_of,
    describe=describe,
    suffixes=(*lora_hf.FORMAT.suffixes, "lora_magnitude_vector"),
    write=write,
    read=read,
    claims=lambda config: bool(config.get("use_dora")),
)
