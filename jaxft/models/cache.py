"""The key-value cache: fixed slots, written in order, each with its position and segment.

Layout: k, v [L, B, S, K, H]; positions, segments int32[B, S] (segment 0 marks an empty or padded slot); index int32[]
is the next slot to write. All rows advance together: prompts are padded on the left.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.config import ModelConfig

Cache = dict[str, jax.Array]


def create(config: ModelConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache of ``slots`` positions for ``batch`` rows."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "positions": empty,
        "segments": empty,
        "index": jnp.zeros((), jnp.int32),
    }


def advance(cache: Cache, positions_BT: jax.Array, segments_BT: jax.Array) -> Cache:
    """Marks the next T slots as holding these positions and segments; keys and values are written layer by layer."""
    start = (0, cache["index"])
    return {
        **cache,
        "positions": jax.lax.dynamic_update_slice(cache["positions"], positions_BT.astype(jnp.int32), start),
        "segments": jax.lax.dynamic_update_slice(cache["segments"], segments_BT.astype(jnp.int32), start),
        "index": cache["index"] + positions_BT.shape[1],
    }


def write(cache: Cache, layer: Any, index: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """Writes the keys and values of T new slots of one layer, starting at slot ``index``."""
    start = (layer, 0, index, 0, 0)
    return {
        **cache,
        "k": jax.lax.dynamic_update_slice(cache["k"], k_BTKH[None].astype(cache["k"].dtype), start),
        "v": jax.lax.dynamic_update_slice(cache["v"], v_BTKH[None].astype(cache["v"].dtype), start),
    }


def read(cache: Cache, layer: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, S, K, H] of one layer."""
    k = jax.lax.dynamic_index_in_dim(cache["k"], layer, keepdims=False)
    return k, jax.lax.dynamic_index_in_dim(cache["v"], layer, keepdims=False)
