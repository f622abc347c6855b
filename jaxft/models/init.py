"""Shapes of every weight, and random weights: for training from nothing and for benchmarks."""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Affine
from jaxft.models.config import ModelConfig


def shapes(config: ModelConfig, names: Names) -> dict[str, tuple[int, ...]]:
    """Shape of the weight at each path of the name map, ``[*stack, in, out]``; of a norm, that of its vectors."""
    d, f, v = config.hidden_size, config.mlp_size, config.vocab_size
    n, k, h = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.head_dim
    q_norm, k_norm = ((h,), (h,)) if config.qk_norm == "head" else ((n,), (k,))
    single = {
        "embed/tokens": (v, d), "embed/positions": (config.max_positions, d), "head": (d, v), "final_norm": (d,),
        "score": (d, config.labels),
        "layers/attn/q": (d, n), "layers/attn/k": (d, k), "layers/attn/v": (d, k), "layers/attn/o": (n, d),
        "layers/attn/qkv": (d, n + 2 * k), "layers/attn/q_norm": q_norm, "layers/attn/k_norm": k_norm,
        "layers/mlp/gate": (d, f), "layers/mlp/up": (d, f), "layers/mlp/gate_up": (d, 2 * f), "layers/mlp/down": (f, d),
    }  # fmt: skip
    norms = dict.fromkeys(("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"), (d,))
    single |= {f"layers/{name}": shape for name, shape in norms.items()}
    return {row.path: (config.num_layers, *single[row.path]) if row.stacked else single[row.path] for row in names}


LARGE, PARTS = 2**24, 16
Pack = Callable[[jax.Array], Any]


def random(
    config: ModelConfig,
    names: Names,
    key: jax.Array,
    dtype: Any,
    deviation: float = 0.02,
    pack: Callable[[Name], Pack | None] | None = None,
) -> tree.Params:
    """Random parameters: normal matrices, norms of ones (stored offsets: zeros), biases of zero, made on the device.

    ``pack(name)``: what stores a matrix of that name in fewer bits, or None; each layer is packed as it is drawn."""
    params: tree.Params = {}
    sizes = shapes(config, names)
    for row in names:
        shape = sizes[row.path]
        if row.kind == "norm":
            value: Any = {"scale": jnp.full(shape, 1.0 - config.norm_offset, dtype)}
            if row.bias:
                value["bias"] = jnp.zeros(shape, dtype)
        else:
            how = None if pack is None else pack(row)
            value = _normal(jax.random.fold_in(key, zlib.crc32(row.path.encode())), shape, dtype, deviation, how)
            if row.bias:
                value = Affine(value, jnp.zeros((*shape[:-2], shape[-1]), dtype))
        params = _put(params, row.path, value)
    return params


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _normal(key: jax.Array, shape: Sequence[int], dtype: Any, deviation: float, pack: Pack | None) -> Any:
    """Layer by layer, a large matrix part by part, so that the float32 draw never exists for the whole."""
    if len(shape) < 3:
        parts = PARTS if math.prod(shape) >= LARGE and shape[0] % PARTS == 0 else 1

        def part(key: jax.Array) -> jax.Array:
            return (deviation * jax.random.normal(key, (shape[0] // parts, *shape[1:]))).astype(dtype)

        drawn = part(key) if parts == 1 else jax.lax.map(part, jax.random.split(key, parts)).reshape(shape)
        return drawn if pack is None else pack(drawn)
    return jax.lax.map(lambda k: _normal(k, shape[1:], dtype, deviation, pack), jax.random.split(key, shape[0]))


def _put(params: tree.Params, path: str, value: Any) -> tree.Params:
    head, _, rest = path.partition("/")
    return {**params, head: _put(params.get(head, {}), rest, value) if rest else value}
