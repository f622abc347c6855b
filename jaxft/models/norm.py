"""Root-mean-square and layer normalisation, computed in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.config import ModelConfig


def norm(config: ModelConfig, p: dict[str, Any], x: jax.Array) -> jax.Array:
    """Normalises the last axis: rms (Zhang & Sennrich 2019, arXiv:1910.07467) or layer norm. ``p``: scale[, bias].

    The scale is applied in float32 before rounding where it is stored as an offset (gemma) and in a layer norm,
    otherwise after it, as llama's own code does; in float32 the two agree."""
    y = x.astype(jnp.float32)
    if config.norm == "layer":
        y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.norm_eps)
    if config.norm == "layer" or config.norm_offset:
        y = y * (config.norm_offset + p["scale"].astype(jnp.float32))
        if "bias" in p:
            y = y + p["bias"].astype(jnp.float32)
        return y.astype(x.dtype)
    return y.astype(x.dtype) * p["scale"].astype(x.dtype)
