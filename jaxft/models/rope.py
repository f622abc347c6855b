"""Rotary position embeddings and every frequency scaling that Hugging Face knows.

Su et al. 2021 (arXiv:2104.09864); linear interpolation: Chen et al. 2023; dynamic NTK; YaRN: Peng et al. 2023
(arXiv:2309.00071); LongRoPE: Ding et al. 2024 (arXiv:2402.13753); llama3: wavelength-dependent smoothing. A head is
rotated as two halves, ``(x1 cos - x2 sin, x2 cos + x1 sin)``, the order in which checkpoints store it.

Unusual: dynamic and longrope depend on the longest position of the batch, as in `transformers`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]


@dataclass(frozen=True)
class Rope:
    """One rotary table; fields beyond ``theta`` matter only to the kinds that name them."""

    dim: int
    """Rotated features of each head (the first ones); the others pass through."""
    theta: float = 10000.0
    kind: Kind = "default"
    factor: float = 1.0
    """linear, dynamic, yarn, llama3, proportional: how much longer than trained."""
    original_max: int = 0
    """yarn, longrope, llama3: positions of pretraining; dynamic: max_position_embeddings."""
    attention_factor: float = 1.0
    """yarn, longrope: multiplier of cos and sin."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: wavelengths (in units of original_max) between which scaling fades in."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: rotations that bound the ramp, and whether the bounds are rounded."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    """longrope: divisors of the frequencies within and beyond original_max."""
    rotated: int = 0
    """proportional: features with a frequency other than zero."""


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """Radians per position: float32[dim / 2], for the kinds that do not depend on the batch."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = (1.0 / (rope.theta**exponents)).astype(np.float32)
    if rope.kind in ("default", "dynamic"):
        return plain
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "proportional":
        live = np.arange(rope.dim // 2) < rope.rotated // 2
        return np.where(live, plain, 0).astype(np.float32) / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    if rope.kind == "longrope":
        return (plain / np.asarray(rope.short_factor, np.float32)).astype(np.float32)
    raise ValueError(f"rope kind {rope.kind!r} is not known")


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / plain
    low, high = rope.original_max / rope.low_freq_factor, rope.original_max / rope.high_freq_factor
    smooth = (rope.original_max / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = np.where(wavelength > low, plain / rope.factor, blended)
    return np.where(wavelength < high, plain, scaled).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    def feature(rotations: float) -> float:  # the feature that turns this often over the original length
        return rope.dim * math.log(rope.original_max / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001  # negative, and then nothing is stretched, where beta_slow leaves no feature
    keep = 1 - np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (plain / rope.factor * (1 - keep) + plain * keep).astype(np.float32)


def table(rope: Rope, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32[B, T, dim / 2], for integer positions."""
    frequencies = jnp.asarray(inverse_frequencies(rope))
    if rope.kind in ("dynamic", "longrope"):
        length = jnp.max(positions_BT) + 1
        exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
        if rope.kind == "longrope":
            far = (1.0 / (np.asarray(rope.long_factor, np.float32) * rope.theta**exponents)).astype(np.float32)
            frequencies = jnp.where(length > rope.original_max, far, frequencies)
        else:
            reach = jnp.maximum(length, rope.original_max).astype(jnp.float32)
            stretch = rope.factor * reach / rope.original_max - (rope.factor - 1)
            theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
            frequencies = 1.0 / theta**exponents
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first ``2 * cos.shape[-1]`` features of each head, in float32, back in the dtype of x."""
    half = cos.shape[-1]
    x = x_BTNH.astype(jnp.float32)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x_BTNH[..., 2 * half :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned
