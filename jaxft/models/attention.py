"""Attention, one function: who may see whom is said by positions and segments, how it is computed by the platform.

A backend is chosen by literal rules on static facts (`attention_choice`); what a kernel cannot do falls to the chunked
XLA path, said once in the log. Unusual: self-attention is recognised by *identity* (queries and keys are given the very
same positions and segments arrays), which promises that inside a segment index order is position order; the positions
themselves are then not read. Under a mesh (`jax.set_mesh`, or `mesh=`) the TPU kernel runs on each device's own rows
and heads.
"""

import dataclasses
import functools
import logging
import math
import re
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.models import attention_choice, attention_cudnn, attention_xla
from jaxft.models.attention_choice import Backend

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

logger = logging.getLogger("jaxft.attention")


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
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str = "tensor",
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention with grouped heads: out_BTNH, in the dtype of q; a query that sees no key gives 0.

    Query t sees key s where both segments are equal and not 0 (None: no such condition), k_position <= q_position (if
    causal), and q_position - k_position < window (if any). Query head n reads key head n // (N / K).
    `prefix`: keys and values [P, K, H] before all of these, at positions 0..P-1, which every query outside segment 0
    sees as far as the window reaches; the positions of queries and keys begin at P then.
    `scale` multiplies the scores, then `softcap * tanh(scores / softcap)`. To a `jax.checkpoint` policy XLA and splash
    offer what their backward pass keeps (output, log-sum-exp) under the name `attention_xla.RESIDUALS`; cuDNN's are
    the outputs of a primitive with "dot_product_attention_fwd" in its name.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, window)
    asked = window
    aligned = q_positions_BT is k_positions_BS and q_segments_BT is k_segments_BS
    if aligned and window is not None and window >= q_BTNH.shape[1]:
        window = None  # it hides nothing
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    rows, heads = _free(mesh, batch_axes), _free(mesh, (head_axis,))
    choice = attention_choice.choose(
        dataclasses.replace(
            _facts(q_BTNH, k_BSKH, mesh), aligned=aligned, causal=causal, segments=q_segments_BT is not None,
            window=window, softcap=softcap, prefix=prefix is not None,
            batch_shards=_size(mesh, rows), head_shards=_size(mesh, heads),
        ),
        backend,
    )  # fmt: skip
    if choice.fell_back:
        _say_once(choice.reason)
    if choice.backend == "cudnn":
        return attention_cudnn.attend(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale=scale, window=window, causal=causal)
    if choice.backend == "splash":
        from jaxft.models import attention_splash  # Pallas for TPU: imported where there is one

        run = attention_splash.attend
        if _size(mesh, _free(mesh, mesh.axis_names)) > 1:
            run = functools.partial(attention_splash.attend_sharded, mesh=mesh, batch_axes=rows, head_axes=heads)
        return run(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale=scale, window=window, softcap=softcap, causal=causal)
    spec = attention_xla.Spec(scale=scale, window=window, softcap=softcap, causal=causal, aligned=aligned)
    positions = (None, None) if aligned else (q_positions_BT, k_positions_BS)
    ids = attention_xla.Ids(*positions, q_segments_BT, k_segments_BS)
    own = attention_xla.part(spec, q_BTNH, k_BSKH, v_BSKH, ids)
    if prefix is None:
        return own[0]
    spec = dataclasses.replace(spec, window=asked, causal=False, aligned=False)  # which is all before any query
    return attention_xla.merge([own, _before(spec, q_BTNH, *prefix, q_positions_BT, q_segments_BT)])


def _before(
    spec: attention_xla.Spec,
    q_BTNH: jax.Array,
    k_PKH: jax.Array,
    v_PKH: jax.Array,
    q_positions_BT: jax.Array | None,
    q_segments_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The part of the attention that goes to a prefix."""
    B, P = q_BTNH.shape[0], k_PKH.shape[0]
    k_BPKH, v_BPKH = (jnp.broadcast_to(x, (B, *x.shape)) for x in (k_PKH, v_PKH))
    at_BP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    segments = (None, None) if q_segments_BT is None else (jnp.minimum(q_segments_BT, 1), jnp.ones_like(at_BP))
    return attention_xla.part(spec, q_BTNH, k_BPKH, v_BPKH, attention_xla.Ids(q_positions_BT, at_BP, *segments))


def _facts(q_BTNH: jax.Array, k_BSKH: jax.Array, mesh: Mesh) -> attention_choice.Case:
    """The fields of a `Case` that are read off the arrays, the mesh and the machine."""
    B, T, N, H = q_BTNH.shape
    platform = _platform(mesh)
    return attention_choice.Case(
        platform=platform, dtype=q_BTNH.dtype.name,
        batch=B, queries=T, keys=k_BSKH.shape[1], heads=N, kv_heads=k_BSKH.shape[2], head_dim=H,
        capability=_capability() if platform == "gpu" else None,
        matmul_precision=jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    )  # fmt: skip


def _check(q, k, v, q_positions, k_positions, q_segments, k_segments, window: int | None) -> None:
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    if k.shape != (B, S, K, H) or v.shape != k.shape or N % K != 0:
        raise ValueError(
            f"attention: got q {q.shape}, k {k.shape}, v {v.shape}; expected [B, T, N, H], [B, S, K, H] twice, with N "
            "a multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: got q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype")
    for name, x, y in (("positions", q_positions, k_positions), ("segments", q_segments, k_segments)):
        if (x is None) != (y is None):
            raise ValueError(f"attention: got {name} for one of queries and keys; expected both or neither")
        if x is not None and (x.shape != (B, T) or y.shape != (B, S)):
            raise ValueError(f"attention: got {name} {x.shape} and {y.shape}; expected {(B, T)} and {(B, S)}")
    if q_positions is None and q_segments is not k_segments:
        raise ValueError(
            "attention: without positions, queries and keys are the same tokens: give them one segments array"
        )
    if q_positions is k_positions and S != T:
        raise ValueError(f"attention: {T} queries and {S} keys cannot share their positions; give each its own")
    if window is not None and window < 1:
        raise ValueError(f"attention: got window={window}; expected at least 1 (the token itself), or None")


def _free(mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `axes` that the mesh has and that no surrounding shard_map has taken."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(a for a in axes if a in kinds and kinds[a] != jax.sharding.AxisType.Manual)


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[a] for a in axes)


def _platform(mesh: Mesh) -> str:
    """The platform compiled for: the mesh's devices where they are known (a TPU that is not here), else the default."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh.devices.flat[0].platform
    return jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.platform


@functools.cache
def _capability() -> tuple[int, int] | None:
    """CUDA compute capability of the local GPU; None on a GPU of another maker."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(jax.local_devices(backend="gpu")[0].compute_capability))
    return None if found is None else (int(found[1]), int(found[2]))


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("attention falls back to chunked XLA: %s", reason)
