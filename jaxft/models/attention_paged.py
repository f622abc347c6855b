r"""Attention of one new token a row to the pages that hold what came before it.

The work is reading the pages once, so each is read where it lies, by its number in the row's table: in a kernel on one
GPU, and elsewhere by XLA from a copy. Long rows are divided, so that few rows too keep all multiprocessors busy; the
parts are merged by their log-sum-exp (Flash-Decoding, Dao et al. 2023).
"""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models import attention_choice, attention_xla, cache, rope
from jaxft.models.attention_xla import HIDDEN
from jaxft.models.cache import Cache

ADDRESSED = 2**31
"""Elements of an array that a kernel's 32-bit offsets reach."""

PROGRAMS = 512
"""Programs of the kernel that keep an H200 busy."""

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Scores:
    """How scores are made of products: `attention.attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def attend(
    cached: Cache, layer: Any, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array,
    keep_BT: jax.Array, scores: Scores, mesh: Any = None, table: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Adds T tokens a row at these positions to the row's pages, and gives their attention to all of them: [B, T, N,
    H], and the cache.

    ``keep`` bool[B, T]: tokens where it is False are not kept, see nothing and give 0. ``table``: the rotary one
    (`rope.table`) that queries and keys are still to be rotated by."""
    held, _ = cache.of_layer(cached.k, layer)
    if q_BTNH.shape[1] == 1 and has_kernel(q_BTNH, held, mesh):
        if table is not None and 2 * table[0].shape[-1] != q_BTNH.shape[-1]:
            q_BTNH, k_BTKH, table = rope.rotate(q_BTNH, *table), rope.rotate(k_BTKH, *table), None
        lengths_B = jnp.where(keep_BT[:, 0], positions_BT[:, 0] + 1, 0)
        return _on_a_gpu(cached, layer, (q_BTNH, k_BTKH, v_BTKH), table, lengths_B, scores)
    if table is not None:
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, *table), rope.rotate(k_BTKH, *table)
    cached = cache.write(cached, layer, positions_BT, keep_BT, k_BTKH, v_BTKH)
    k_BSKH, v_BSKH = cache.read(cached, layer)
    at_BS = jnp.broadcast_to(jnp.arange(k_BSKH.shape[1], dtype=jnp.int32), k_BSKH.shape[:2])
    spec = attention_xla.Spec(scores.scale, scores.window, scores.softcap, causal=True, aligned=False)
    ids = attention_xla.Ids(positions_BT, at_BS, keep_BT.astype(jnp.int32), jnp.ones_like(at_BS))
    k_BSKH, v_BSKH = (a.astype(q_BTNH.dtype) for a in (k_BSKH, v_BSKH))
    return attention_xla.attend(spec, q_BTNH, k_BSKH, v_BSKH, ids), cached


def has_kernel(q: jax.Array, held: jax.Array, mesh: Any) -> bool:
    """Whether the kernel does this case: 16-bit keys on one NVIDIA GPU from Ampere on, heads of a power of two."""
    able = on_one_gpu() and (mesh is None or mesh.size == 1)
    head, page = held.shape[5], held.shape[4]
    tiles = head & (head - 1) == 0 and 16 <= head <= 256 and page & (page - 1) == 0 and page >= 16
    return able and tiles and held.dtype == q.dtype and q.dtype.itemsize == 2 and held.size < ADDRESSED


def on_one_gpu() -> bool:
    """Whether programs run on one NVIDIA GPU, from Ampere on, with a JAX that the kernels were tested on."""
    devices = jax.local_devices()
    capability = str(getattr(devices[0], "compute_capability", ""))  # of an AMD GPU, a name
    able = re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8.0
    known = jax.__version__.rpartition(".")[0] in attention_choice.TESTED_JAX
    return able and known and len(devices) == jax.device_count() == 1


def _on_a_gpu(
    cached: Cache, layer: Any, heads: tuple[jax.Array, ...], table: Any, lengths_B: jax.Array, scores: Scores
) -> tuple[jax.Array, Cache]:
    """Queries, keys and values go to the kernel as one array: so they come from a product that makes all of them."""
    (k, at), (v, _) = cache.of_layer(cached.k, layer), cache.of_layer(cached.v, layer)
    B, H = heads[1].shape[0], heads[1].shape[3]
    flat_BC = jnp.concatenate([a.reshape(B, -1) for a in heads], axis=1)
    turned = None if table is None else tuple(a[:, 0] for a in table)
    given = (flat_BC.reshape(B, -1, H), turned, k[:, 0], v[:, 0], jnp.asarray(at, jnp.int32), cached.table, lengths_B)
    out, k, v = kernel(*given, scores)
    both = (cache.with_layer(a, layer, new[:, None]) for a, new in ((cached.k, k), (cached.v, v)))
    return out[:, None], dataclasses.replace(cached, **dict(zip("kv", both, strict=True)))


def kernel(
    heads_BCH: jax.Array,
    turned: tuple[jax.Array, jax.Array] | None,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    scores: Scores,
    *,
    splits: int | None = None,
    warps: int = 4,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of a token a row to the first ``lengths`` int32[B] tokens of it, the last of which is the token itself:
    [B, N, H], 0 where there are none; and k and v with the token in its place.

    heads [B, N + 2 K, H]: the token's queries, keys and values; ``turned``: cos and sin float32[B, H / 2] that queries
    and keys are to be rotated by. k, v [layers, pages, K, page, H]; ``layer`` int32[]; ``table`` int32[B, M].
    ``splits``: parts of a row that are read side by side."""
    from jax.experimental import pallas as pl  # imported where there is a GPU
    from jax.experimental.pallas import triton as plgpu

    (B, _, H), K, M = heads_BCH.shape, k.shape[2], table_BM.shape[1]
    N = heads_BCH.shape[1] - 2 * K
    if splits is None:
        splits = max(1, min(M, PROGRAMS // (B * K)))
    out_type = heads_BCH.dtype if splits == 1 else jnp.float32
    shapes = [((splits, B, N, H), out_type), ((splits, B, N), jnp.float32), (k.shape, k.dtype), (v.shape, v.dtype)]
    rotary = () if turned is None else turned
    out, lse, k, v = pl.pallas_call(
        functools.partial(_kernel, pl, plgpu, scores, len(rotary)),
        grid=(B, K, splits),
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        input_output_aliases={4 + len(rotary): 2, 5 + len(rotary): 3},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="paged_attention",
    )(*rotary, layer[None], heads_BCH, table_BM, lengths_B, k, v)
    if splits == 1:
        return out[0], k, v
    weight = jax.nn.softmax(lse, axis=0)  # a part of nothing has HIDDEN
    return jnp.sum(out * weight[..., None], axis=0).astype(heads_BCH.dtype), k, v


def _kernel(pl, plgpu, scores: Scores, rotary: int, *refs) -> None:
    """One row, one head of keys, one part of the row: the online softmax over its pages, and the token itself."""
    (layer, heads, table, lengths, k, v, out, lse, k_out, v_out), turned = refs[rotary:], refs[:rotary]
    row, head, part = (pl.program_id(i) for i in range(3))
    page, length, at, H = k.shape[3], lengths[row], layer[0], heads.shape[2]
    least = 0 if scores.window is None else jnp.maximum(length - scores.window, 0)
    first, last = jax.lax.div(jnp.int32(least), page), pl.cdiv(length, page)
    each = pl.cdiv(last - first, pl.num_programs(2))
    begin = first + part * each
    end = jnp.minimum(begin + each, last)
    kv_heads = k.shape[2]
    N = heads.shape[1] - 2 * kv_heads
    group = N // kv_heads
    tall = max(16, pl.next_power_of_2(group))  # a product on tensor cores has 16 rows at least: some are done twice
    asking = head * group + jax.lax.rem(jnp.arange(tall, dtype=jnp.int32), group)
    new_v = heads[row, N + kv_heads + head]
    asked, new_k = heads[row, asking], heads[row, N + head]
    if rotary:
        column, half = jnp.arange(H, dtype=jnp.int32), H // 2
        across, within = jax.lax.rem(column + half, H), jax.lax.rem(column, half)
        cos, sin = (a[row, within] for a in turned)
        sin = jnp.where(column < half, -sin, sin)
        other_q, other_k = heads[row, asking[:, None], across[None]], heads[row, N + head, across]
        asked, new_k = (
            (a.astype(jnp.float32) * cos + b.astype(jnp.float32) * sin).astype(heads.dtype)
            for a, b in ((asked, other_q), (new_k, other_k))
        )

    def scored(products):
        s = products * scores.scale
        if scores.softcap is not None:
            s = jnp.tanh(s / scores.softcap) * scores.softcap
        return s * LOG2E

    def turn(i, carry):
        peak, total, sums = carry
        number, place = table[row, i], i * page + jnp.arange(page, dtype=jnp.int32)
        s = scored(jnp.dot(asked, k[at, number, head].T, preferred_element_type=jnp.float32))
        s = jnp.where(((place < length - 1) & (place >= least))[None], s, HIDDEN)
        higher = jnp.maximum(peak, jnp.max(s, axis=1))
        p, fade = jnp.exp2(s - higher[:, None]), jnp.exp2(peak - higher)
        p = jnp.where(s > HIDDEN, p, 0.0)  # where nothing is seen yet, HIDDEN is the highest
        values = v[at, number, head]
        sums = sums * fade[:, None] + jnp.dot(p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return higher, total * fade + jnp.sum(p, axis=1), sums

    start = (jnp.full((tall,), HIDDEN, jnp.float32), jnp.zeros((tall,), jnp.float32), jnp.zeros((tall, H), jnp.float32))
    peak, total, sums = jax.lax.fori_loop(begin, end, turn, start)
    # the token itself, which the pages do not hold yet
    keep = (length > 0) & (part == 0)
    s = scored(jnp.sum(asked.astype(jnp.float32) * new_k[None].astype(jnp.float32), axis=1))
    s = jnp.where(keep, s, HIDDEN)
    higher = jnp.maximum(peak, s)
    p, fade = jnp.where(keep, jnp.exp2(s - higher), 0.0), jnp.exp2(peak - higher)
    peak, total = higher, total * fade + p
    sums = sums * fade[:, None] + p[:, None] * new_v[None].astype(jnp.float32)
    seen = total > 0
    over = jnp.where(seen, total, 1.0)
    out[part, row, asking] = (sums / over[:, None]).astype(out.dtype)
    lse[part, row, asking] = jnp.where(seen, (peak + jnp.log2(over)) / LOG2E, HIDDEN)
    newest = jnp.maximum(length - 1, 0)
    number, place = table[row, jax.lax.div(newest, page)], jax.lax.rem(newest, page)
    for new, pool in ((new_k, k_out), (new_v, v_out)):
        kept = jnp.broadcast_to(keep, new.shape)
        plgpu.store(pool.at[at, number, head, place], new.astype(pool.dtype), mask=kept)
