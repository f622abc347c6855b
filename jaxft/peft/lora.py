r"""LoRA: a frozen weight plus a trained low-rank product.

.. math:: y = x W + s\,(x A) B, \qquad s = \alpha / r \ \text{ or } \ \alpha / \sqrt{r} \ (\text{rsLoRA})

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3 (arXiv:2106.09685); the scale of rank
stabilised LoRA: Kalajdzievski 2023, eq. 9 (arXiv:2312.03732). ``A`` is stored [in, r] and ``B`` [r, out], transposed
from torch. Layers are stacked, so ranks that differ by layer are padded with zeros to the largest (zero columns of A
against zero rows of B have zero gradients and never move) and a layer that is not adapted has scale 0.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxft.core import products, verbs
from jaxft.core.weight import Untied, Weight, parameter, static, trainable, weight
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class LoRA(Targeted):
    """Low-rank adaptation. Default learning rate 2e-4."""

    rank: int = 16
    """Rank r of the update."""
    alpha: float | None = None
    """Numerator of the scale; default: twice the rank."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of the adapter while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    init: Literal["kaiming", "gaussian", "a_zero"] = "kaiming"
    """kaiming: A uniform within 1/sqrt(in), B zero; gaussian: A normal with deviation 1/rank, B zero; a_zero: A zero,
    B uniform within 1/sqrt(rank)."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ranks that differ: a regex for the end of a module name to its rank."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Alphas that differ, likewise."""

    embeddings: ClassVar[bool] = True
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    def __post_init__(self) -> None:
        for field, good in {"rank": self.rank >= 1, "dropout": 0.0 <= self.dropout < 1.0}.items():
            if not good:
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected rank >= 1, 0 <= dropout < 1")

    def wrap(self, site: Site) -> "LoRAWeight":
        ranks = site.values(self.rank, self.rank_pattern, np.int32)
        alphas = site.values(2.0 * self.rank if self.alpha is None else self.alpha, self.alpha_pattern)
        embedding = site.name.kind == "embedding"
        a, b = init(site.key, site.base.shape, ranks, "embedding" if embedding else self.init)
        return LoRAWeight(
            base=site.base,
            a=a,
            b=b,
            scale=jnp.asarray(scales(ranks, alphas, self.rslora)),
            rank=jnp.asarray(ranks),
            rate=0.0 if embedding else self.dropout,
            rslora=self.rslora,
            lookup=embedding,
            tied=site.follows,
        )


@weight
class LoRAWeight(Weight):
    """``x @ base + scale * (x @ a) @ b``. a: [*stack, in, r]; b: [*stack, r, out]; scale, rank: [*stack].

    ``lookup``: whether the base is an embedding. ``tied``: as in InPlace, whether a head tied to it follows the
    adapter; None if no head is tied to it.
    """

    base: Any = parameter()
    a: jax.Array = trainable()
    b: jax.Array = trainable()
    scale: jax.Array
    rank: jax.Array
    key: jax.Array | None = None
    rate: float = static(default=0.0)
    rslora: bool = static(default=False)
    lookup: bool = static(default=False)
    tied: bool | None = static(default=None)

    @property
    def adapted(self):
        return self.rank > 0

    def off(self):
        return dataclasses.replace(self, scale=jnp.zeros_like(self.scale), rank=jnp.zeros_like(self.rank))

    def _delta(self, x: jax.Array) -> jax.Array:
        """``scale * (x @ a) @ b`` in the dtype of x; the scale is applied at rank width, where it is cheap."""
        scale = self.scale[..., None, None].astype(x.dtype) if self.scale.ndim else self.scale.astype(x.dtype)
        # Named so that rematerialisation can keep it: at rank width it costs little.
        z = checkpoint_name(x @ self.a.astype(x.dtype), "adapter")
        return (z * scale) @ self.b.astype(x.dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        """The adapter's own input: features dropped while training, the same as ``x`` in evaluation."""
        return products.dropped(x, self.key, self.rate)

    def __rmatmul__(self, x):
        return x @ self.base + self._delta(self._dropped(x))

    def take(self, ids):
        rows = verbs.take(self.base, ids)
        low = self.a[ids].astype(self.scale.dtype) * self.scale
        return rows + (low @ self.b.astype(low.dtype)).astype(rows.dtype)

    def unembed(self, x):
        y = verbs.unembed(self.base, x)
        if not self.tied:
            return y
        low = self._dropped(x) @ self.b.astype(x.dtype).T
        return y + (low * self.scale.astype(x.dtype)) @ self.a.astype(x.dtype).T

    def ragged_dot(self, x, group_sizes):
        a = (self.a * self.scale[..., None, None]).astype(x.dtype)
        low = jax.lax.ragged_dot(self._dropped(x), a, group_sizes)
        return verbs.ragged_dot(x, self.base, group_sizes) + jax.lax.ragged_dot(
            low, self.b.astype(x.dtype), group_sizes
        )

    def dense(self):
        base = verbs.dense(self.base)
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        delta = jnp.matmul(a * self.scale[..., None, None], b, precision="highest")
        return (base.astype(jnp.float32) + delta).astype(base.dtype)

    def merged(self):
        return Untied(self.dense(), self.base) if self.tied is False else self.dense()

    def axes(self, names):
        stack, (rows, columns) = names[:-2], names[-2:]
        return {
            "base": names,
            "a": (*stack, rows, None),
            "b": (*stack, None, columns),
            "scale": stack,
            "rank": stack,
            "key": stack,
        }


def scales(ranks: np.ndarray, alphas: np.ndarray, rslora: bool) -> np.ndarray:
    """float32: alpha / rank, or alpha / sqrt(rank); 0 where the rank is 0 (a layer that is not adapted)."""
    divisor = np.maximum(np.sqrt(ranks) if rslora else ranks, 1)
    return np.where(ranks > 0, alphas / divisor, 0.0).astype(np.float32)


def init(key: jax.Array, shape: tuple[int, ...], ranks: np.ndarray, how: str) -> tuple[jax.Array, jax.Array]:
    """A float32[*stack, in, R] and B float32[*stack, R, out] whose product is zero, zero beyond each layer's rank."""
    *stack, rows, columns = shape
    width = int(ranks.max())
    real = jnp.arange(width) < ranks[..., None]  # bool[*stack, R]
    a_shape, b_shape = (*stack, rows, width), (*stack, width, columns)
    divisor = jnp.maximum(jnp.asarray(ranks, jnp.float32), 1.0)[..., None, None]
    a, b = jnp.zeros(a_shape), jnp.zeros(b_shape)
    if how == "kaiming":
        a = jax.random.uniform(key, a_shape, minval=-1.0, maxval=1.0) / np.sqrt(rows)
    elif how == "gaussian":
        a = jax.random.normal(key, a_shape) / divisor
    elif how == "a_zero":
        b = jax.random.uniform(key, b_shape, minval=-1.0, maxval=1.0) / jnp.sqrt(divisor)
    elif how == "embedding":
        b = jax.random.normal(key, b_shape)
    else:
        raise ValueError(f"peft.init: got {how!r}; expected kaiming, gaussian or a_zero")
    return jnp.where(real[..., None, :], a, 0.0), jnp.where(real[..., None], b, 0.0)
