"""Shapes of every weight, and random weights: for training from nothing and for benchmarks."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.core.weight import Affine
from jaxft.models.config import ModelConfig


def shapes(config: ModelConfig, names: Names) -> dict[str, tuple[int, ...]]:
    """Shape of the weight at each path of the name map, ``[*stack, in, out]``; of a norm, that of its vectors."""
    d, f, v = config.hidden_size, config.mlp_size, config.vocab_size
    n, k, h = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.head_dim
    q_norm, k_norm = ((h,), (h,)) if config.qk_norm == "head" else ((n,), (k,))
    single = {
        "embed/tokens": (v, d), "embed/positions": (config.max_positions, d), "head": (d, v), "final_norm": (d,),
        "layers/attn/q": (d, n), "layers/attn/k": (d, k), "layers/attn/v": (d, k), "layers/attn/o": (n, d),
        "layers/attn/qkv": (d, n + 2 * k), "layers/attn/q_norm": q_norm, "layers/attn/k_norm": k_norm,
        "layers/mlp/gate": (d, f), "layers/mlp/up": (d, f), "layers/mlp/gate_up": (d, 2 * f), "layers/mlp/down": (f, d),
    }  # fmt: skip
    norms = dict.fromkeys(("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"), (d,))
    single |= {f"layers/{name}": shape for name, shape in norms.items()}
    return {row.path: (config.num_layers, *single[row.path]) if row.stacked else single[row.path] for row in names}


def random(config: ModelConfig, names: Names, key: jax.Array, dtype: Any, deviation: float = 0.02) -> tree.Params:
    """Random parameters: normal matrices, norms of ones (stored offsets: zeros), biases of zero, made on the device."""
    params: tree.Params = {}
    sizes = shapes(config, names)
    for row in names:
        shape = sizes[row.path]
        if row.kind == "norm":
            value: Any = {"scale": jnp.full(shape, 1.0 - config.norm_offset, dtype)}
            if row.bias:
                value["bias"] = jnp.zeros(shape, dtype)
        else:
            value = _normal(jax.random.fold_in(key, zlib.crc32(row.path.encode())), shape, dtype, deviation)
            if row.bias:
                value = Affine(value, jnp.zeros((*shape[:-2], shape[-1]), dtype))
        params = _put(params, row.path, value)
    return params


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, deviation: float) -> jax.Array:
    """Layer by layer, so that the float32 draw never exists for the whole stack."""
    if len(shape) < 3:
        return (deviation * jax.random.normal(key, shape)).astype(dtype)
    return jax.lax.map(lambda k: _normal(k, shape[1:], dtype, deviation), jax.random.split(key, shape[0]))


def _put(params: tree.Params, path: str, value: Any) -> tree.Params:
    head, _, rest = path.partition("/")
    return {**params, head: _put(params.get(head, {}), rest, value) if rest else value}
