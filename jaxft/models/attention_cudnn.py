"""Attention by cuDNN, through the public `jax.nn.dot_product_attention`.

Unusual: cuDNN's own causal and sliding-window masks skip what they hide, a packing mask does not (it is an additive
bias of [B, 1, T, T]), so it is passed only where rows are packed and, there, has to carry the window too: cuDNN refuses
a window beside a bias. A `jax.checkpoint` policy sees the forward primitive itself ("dot_product_attention_fwd" in its
name), hence nothing is wrapped around it here.
"""

from typing import Literal

import jax
import jax.numpy as jnp


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Self-attention, out_BTNH; `implementation="xla"` is the same call on a machine without a GPU."""
    packed = segments_BT is not None
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=packing_mask(segments_BT, window) if packed else None,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None or packed else (window - 1, 0),
        implementation=implementation,
    )
    if not packed:
        return out_BTNH
    return jnp.where((segments_BT != 0)[:, :, None, None], out_BTNH, jnp.zeros((), out_BTNH.dtype))


def packing_mask(segments_BT: jax.Array, window: int | None) -> jax.Array:
    """bool[B, 1, T, T]: same segment, within the window; padding sees padding, as a softmax needs something to see."""
    mask_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if window is not None:
        index = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
        mask_BTT &= index[:, None] - index[None, :] < window
    return mask_BTT[:, None]
