r"""RoAd: the output of a linear layer, bias included, is turned and scaled in pairs of features.

.. math:: \begin{pmatrix} z_j \\ z_{j'} \end{pmatrix} = \begin{pmatrix}
          \alpha_{11} \cos\theta_{11} & -\alpha_{12} \sin\theta_{12} \\
          \alpha_{21} \sin\theta_{21} & \alpha_{22} \cos\theta_{22} \end{pmatrix}
          \begin{pmatrix} y_j \\ y_{j'} \end{pmatrix}, \qquad y = x W + b

Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
eq. 2 and 4 (arXiv:2409.00119). road_1 shares angle and scale in a pair (``out`` numbers for a module), road_2 in a row
of the matrix (2 out), road_4 nowhere (4 out). Feature j is paired with j + group_size / 2 of the same group.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft.disk import Tensors
from jaxft.peft.formats import Fields, Format
from jaxft.peft.sites import Site, Targeted

# angles (and as many scales) of a pair of features
ANGLES = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True)
class RoAd(Targeted):
    """Rotary adaptation in two dimensions. Default learning rate 3e-3."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """What angle and scale are shared by: a pair of features, a row of its matrix, or nothing."""
    group_size: int = 64
    """Features in a group, even: the first half is paired with the second. A divisor of every module's output."""

    outside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variant not in ANGLES:
            raise ValueError(f"peft.variant: got {self.variant!r}; expected {', '.join(ANGLES)}")
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"peft.group_size: got {self.group_size}; expected an even number of at least 2")

    def wrap(self, site: Site) -> "RoAdWeight":
        out = site.shape[1]
        if out % self.group_size:
            raise ValueError(
                f"peft.group_size: got {self.group_size}, no divisor of the {out} outputs of {site.modules[0]}; "
                "expected an even divisor of every adapted module's outputs. Or leave it out with peft.exclude."
            )
        shape = (*site.layers.shape, out // 2 * ANGLES[self.variant])
        return RoAdWeight(site.base, jnp.zeros(shape), jnp.ones(shape), site.gate, self.variant, self.group_size)


@weight
class RoAdWeight(Weight):
    """``(x @ base)`` turned. theta (radians), alpha: [*stack, out / 2 x angles of a pair]; gate: [*stack]."""

    base: Any = parameter()
    theta: jax.Array = trainable()
    alpha: jax.Array = trainable()
    gate: jax.Array
    variant: str = static(default="road_1")
    group_size: int = static(default=64)

    def __rmatmul__(self, x):
        y = x @ self.base
        first, second = self.columns()
        pairs = y.astype(jnp.float32).reshape(*y.shape[:-1], *first.shape)
        across = jnp.stack([-pairs[..., 1, :], pairs[..., 0, :]], axis=-2)
        return (pairs * first + across * second).reshape(y.shape).astype(y.dtype)

    def columns(self) -> tuple[jax.Array, jax.Array]:
        """What the features themselves, and those they are paired with, are multiplied by: float32[groups, 2, half]."""
        half = self.group_size // 2
        angles = ANGLES[self.variant]
        shape = (self.shape[-1] // self.group_size, max(angles // 2, 1), min(angles, 2), half)
        theta, alpha = (a.reshape(shape) for a in (self.theta, self.alpha))
        both = (alpha[:, 0] * jnp.cos(theta[:, 0]), alpha[:, -1] * jnp.sin(theta[:, -1]))
        first, second = (jnp.broadcast_to(a, (shape[0], 2, half)) for a in both)
        return jnp.where(self.gate > 0, first, 1.0), jnp.where(self.gate > 0, second, 0.0)


def config_of(config: Fields) -> RoAd:
    """Our settings from peft's."""
    return RoAd(variant=config.get("variant", "road_1"), group_size=config.get("group_size", 64))


def describe(w: RoAdWeight) -> Fields:
    """What all adapted modules have in common."""
    return {"variant": w.variant, "group_size": w.group_size}


def write(w: RoAdWeight) -> Tensors:
    """One layer's angles and scales."""
    return {"road_theta": np.asarray(w.theta), "road_alpha": np.asarray(w.alpha)}


def read(w: RoAdWeight, tensors: Tensors) -> RoAdWeight:
    """One layer with its angles and scales."""
    return dataclasses.replace(w, theta=tensors["road_theta"], alpha=tensors["road_alpha"])


FORMAT = Format(
    peft_type="ROAD",
    leaf=RoAdWeight,
    fields=("variant", "group_size", "init_weights", "target_modules"),
    config=config_of,
    describe=describe,
    suffixes=("road_theta", "road_alpha"),
    write=write,
    read=read,
)
