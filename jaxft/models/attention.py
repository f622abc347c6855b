"""Attention, one function: who may see whom is said by positions and segments, how it is computed by the platform.

A backend is chosen by literal rules on static facts (platform, dtype, shapes, window, soft-cap, packing); what a fast
kernel cannot do falls to the chunked XLA path. Unusual: self-attention is recognised by *identity* (the same positions
array for queries and keys), which promises that inside a segment index order is position order.
"""

from typing import Literal

import jax

from jaxft.models import attention_xla

Backend = Literal["xla", "cudnn", "splash"]


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array | None,
    k_positions_BS: jax.Array | None,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: Literal["auto"] | Backend = "auto",
    causal: bool = True,
) -> jax.Array:
    """Softmax attention with grouped heads: out_BTNH, in the dtype of q."""
    aligned = q_positions_BT is k_positions_BS
    spec = attention_xla.Spec(scale=scale, window=window, softcap=softcap, causal=causal, aligned=aligned)
    ids = attention_xla.Ids(None, None, q_segments_BT, k_segments_BS)
    if not aligned:
        ids = ids._replace(q_positions=q_positions_BT, k_positions=k_positions_BS)
    return attention_xla.attend(spec, q_BTNH, k_BSKH, v_BSKH, ids)
