"""Attention by the splash kernel on TPU: causal, packed, windowed, soft-capped, grouped heads.

Unusual: a Pallas kernel is opaque to the partitioner, so under a mesh each device runs it on its own rows and heads
(`jax.shard_map`), and the scale is multiplied into q, one more rounding in bfloat16.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from jaxft.models import attention_choice, attention_xla


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Self-attention of one device's rows and heads, out_BTNH; `interpret` runs the kernel's Python on a CPU."""
    T, N = q_BTNH.shape[1], q_BTNH.shape[2]
    kernel = _kernel(T, N, window, softcap, causal, block or attention_choice.splash_block(T), interpret)
    q = rearrange((q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype), "b t n h -> b n t h")
    k, v = (rearrange(x, "b t k h -> b k t h") for x in (k_BTKH, v_BTKH))
    if segments_BT is None:
        return rearrange(jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v), "b n t h -> b t n h")
    out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))(q, k, v, segments_BT)
    out_BTNH = rearrange(out, "b n t h -> b t n h")
    return jnp.where((segments_BT != 0)[:, :, None, None], out_BTNH, jnp.zeros((), q_BTNH.dtype))


def attend_sharded(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    batch_axes: tuple[str, ...],
    head_axes: tuple[str, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """`attend` under a mesh: rows over `batch_axes`, heads over `head_axes`; the other axes repeat the work."""
    shards = math.prod(mesh.shape[a] for a in head_axes)
    if k_BTKH.shape[2] % shards:  # fewer key heads than shards: each shard of the queries gets the one it needs
        k_BTKH, v_BTKH = (jnp.repeat(x, shards // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    run = functools.partial(attend, scale=scale, window=window, softcap=softcap, causal=causal, interpret=interpret)
    rows, spec = P(batch_axes or None), P(batch_axes or None, None, head_axes or None)
    free = {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != jax.sharding.AxisType.Manual}
    # The kernel's outputs do not say over which axes they vary, hence check_vma=False.
    f = jax.shard_map(
        run, mesh=mesh, in_specs=(spec, spec, spec, rows), out_specs=spec, axis_names=free, check_vma=False
    )
    return f(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _kernel(
    T: int, N: int, window: int | None, softcap: float | None, causal: bool, b: int | None, interpret: bool
) -> Callable[..., Any]:
    """The kernel for N heads over T tokens; the library itself keeps the lists of blocks it makes from a mask."""
    if b is None:
        raise ValueError(f"splash attention: got rows of {T} tokens; expected a multiple of 128: pad the rows")
    blocks = splash.BlockSizes(
        block_q=b, block_kv=b, block_kv_compute=b,
        block_q_dkv=b, block_kv_dkv=b, block_kv_dkv_compute=b,
        block_q_dq=b, block_kv_dq=b,
    )  # fmt: skip
    if window is not None:
        mask = splash.LocalMask((T, T), (window - 1, 0 if causal else None), offset=0)
    else:
        mask = splash.CausalMask((T, T)) if causal else splash.FullMask((T, T))
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=attention_xla.RESIDUALS,
        interpret=interpret,
    )
