"""Attention in plain XLA: exact everywhere, block by block, never [B, N, T, T].

The scores exist for one (query block, key block) pair at a time, merged by the online softmax; the backward pass keeps
only the output and its log-sum-exp and makes the scores again. Unusual: the pairs worth visiting (lower triangle,
window band) are a static list, so what causality hides costs nothing, and a pass is one loop however long the row.
FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "attn"
"""Name under which output and log-sum-exp are offered to a `jax.checkpoint` policy."""

BLOCK = 512
"""Queries (and keys) a block; shorter rows are one block and no loop."""

HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # finite, so that no difference of two of them is NaN


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static half of a call: what may see what, apart from the arrays."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    aligned: bool = True
    block: int = BLOCK


class Ids(NamedTuple):
    """The integers that decide visibility; positions are None when aligned, segments None without packing."""

    q_positions: jax.Array | None = None
    k_positions: jax.Array | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None


class _Grid(NamedTuple):
    """How a call is cut: block lengths, block counts, true lengths, and the pairs of blocks to visit."""

    c: int
    d: int
    rows: int
    columns: int
    T: int
    S: int
    pairs: np.ndarray


def attend(spec: Spec, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids: Ids) -> jax.Array:
    """Softmax attention, out_BTNH in the dtype of q; a query that sees nothing gives 0."""
    return part(spec, q_BTNH, k_BSKH, v_BSKH, ids)[0]


def part(spec: Spec, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids: Ids) -> tuple[jax.Array, jax.Array]:
    """`attend` over some of the keys, and what `merge` needs: the log-sum-exp of the scores, float32[B, T, N]."""
    return _attend(spec, q_BTNH, k_BSKH, v_BSKH, ids)


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Attention over all keys from that over each part of them: out_BTNH, weighted by their sums of exponentials."""
    outs, sums = zip(*parts, strict=True)
    weights = jax.nn.softmax(jnp.stack(sums), axis=0)[..., None]
    return jnp.sum(jnp.stack(outs).astype(jnp.float32) * weights, axis=0).astype(outs[0].dtype)


def block_length(length: int, limit: int) -> int:
    """Length of the fewest blocks of at most `limit` that cover `length`; a multiple of 64 when there are several."""
    if length <= limit:
        return length
    return min(limit, -(-length // math.ceil(length / limit) // 64) * 64) if limit >= 64 else limit


def _grid(spec: Spec, T: int, S: int) -> _Grid:
    c = block_length(T, spec.block)
    d = c if spec.aligned else block_length(S, max(spec.block, spec.block**2 // c))
    rows, columns = -(-T // c), -(-S // d)
    pairs = [(i, j) for i in range(rows) for j in range(columns) if not spec.aligned or _meets(spec, i, j, c)]
    return _Grid(c, d, rows, columns, T, S, np.asarray(pairs, np.int32).reshape(-1, 2))


def _meets(spec: Spec, i: int, j: int, c: int) -> bool:
    """Whether any query of block i may see any key of block j, by index alone."""
    nearest, farthest = (i - j) * c - (c - 1), (i - j) * c + (c - 1)
    return (farthest >= 0 or not spec.causal) and (spec.window is None or nearest < spec.window)


def _at(x: jax.Array, i: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _cut(x: jax.Array, n: int, length: int) -> jax.Array:
    """[B, T, ...] padded with zeros and cut to [n, B, length, ...]."""
    x = jnp.pad(x, [(0, 0), (0, n * length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return rearrange(x, "b (n c) ... -> n b c ...", n=n)


def _cut_queries(x_BTNH: jax.Array, kv_heads: int, grid: _Grid) -> jax.Array:
    return rearrange(_cut(x_BTNH, grid.rows, grid.c), "n b c (k g) h -> n b k g c h", k=kv_heads)


def _cut_keys(x_BSKH: jax.Array, grid: _Grid) -> jax.Array:
    return rearrange(_cut(x_BSKH, grid.columns, grid.d), "n b s k h -> n b k s h")


def _join_queries(x: jax.Array, T: int) -> jax.Array:
    return rearrange(x, "n b k g c h -> b (n c) (k g) h")[:, :T]


def _join_sums(x: jax.Array, T: int) -> jax.Array:
    return _join_queries(x[..., None], T)[..., 0]


def _join_keys(x: jax.Array, S: int) -> jax.Array:
    return rearrange(x, "n b k s h -> b (n s) k h")[:, :S]


def _cut_ids(ids: Ids, grid: _Grid) -> Ids:
    q = [None if x is None else _cut(x, grid.rows, grid.c) for x in (ids.q_positions, ids.q_segments)]
    k = [None if x is None else _cut(x, grid.columns, grid.d) for x in (ids.k_positions, ids.k_segments)]
    return Ids(q[0], k[0], q[1], k[1])


def _keep(spec: Spec, grid: _Grid, ids: Ids, i: jax.Array, j: jax.Array) -> jax.Array | None:
    """What block i of the queries sees of block j of the keys: bool[B or 1, 1, 1, c, d], or None for everything."""
    key_index = j * grid.d + jnp.arange(grid.d, dtype=jnp.int32)
    if ids.q_positions is None or ids.k_positions is None:
        distance = (i * grid.c + jnp.arange(grid.c, dtype=jnp.int32))[None, :, None] - key_index
    else:
        distance = _at(ids.q_positions, i)[:, :, None] - _at(ids.k_positions, j)[:, None, :]
    keep = [distance >= 0] if spec.causal else []
    if spec.window is not None:
        keep.append(distance < spec.window)
    if ids.q_segments is not None and ids.k_segments is not None:
        q_segments, k_segments = _at(ids.q_segments, i)[:, :, None], _at(ids.k_segments, j)[:, None, :]
        keep += [q_segments == k_segments, k_segments != 0]
    if grid.columns * grid.d != grid.S:
        keep.append((key_index < grid.S)[None, None, :])
    return functools.reduce(jnp.logical_and, keep)[:, None, None] if keep else None


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _scores(spec: Spec, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scaled (and capped) scores float32[B, K, G, c, d], and the cap's slope at each."""
    s = _dot("bkgch,bkdh->bkgcd", q, k) * spec.scale
    if spec.softcap is None:
        return s, None
    t = jnp.tanh(s / spec.softcap)
    return t * spec.softcap, 1.0 - t * t


def _loop(grid: _Grid, body, carry):
    """Run body(i, j, carry) over the grid's pairs; a single pair needs no loop."""
    if len(grid.pairs) == 1:
        return body(0, 0, carry)
    pairs = jnp.asarray(grid.pairs)
    return jax.lax.fori_loop(0, len(grid.pairs), lambda n, x: body(pairs[n, 0], pairs[n, 1], x), carry)


def _forward(spec: Spec, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids: Ids):
    """The output [B, T, N, H] and the log-sum-exp of the scores, float32[rows, B, K, G, c]; HIDDEN if there is none."""
    grid = _grid(spec, q_BTNH.shape[1], k_BSKH.shape[1])
    q, k, v = _cut_queries(q_BTNH, k_BSKH.shape[2], grid), _cut_keys(k_BSKH, grid), _cut_keys(v_BSKH, grid)
    ids = _cut_ids(ids, grid)

    def body(i, j, carry):
        peak, total, out = (_at(x, i) for x in carry)
        s, _ = _scores(spec, _at(q, i), _at(k, j))
        keep = _keep(spec, grid, ids, i, j)
        if keep is not None:
            s = jnp.where(keep, s, HIDDEN)
        new_peak = jnp.maximum(peak, s.max(-1))
        p = jnp.exp(s - new_peak[..., None])
        if keep is not None:
            p = jnp.where(keep, p, 0.0)  # a query that sees nothing here has HIDDEN for its peak
        fade = jnp.exp(peak - new_peak)
        out = out * fade[..., None] + _dot("bkgcd,bkdh->bkgch", p.astype(v.dtype), _at(v, j))
        new = (new_peak, total * fade + p.sum(-1), out)
        return tuple(jax.lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in zip(carry, new, strict=True))

    start = (jnp.full(q.shape[:-1], HIDDEN), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape))
    start = tuple(x.astype(jnp.float32) for x in start)
    peak, total, out = _loop(grid, body, start)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out = (out / total[..., None]).astype(q.dtype)
    return _join_queries(out, grid.T), jnp.where(seen, peak + jnp.log(total), HIDDEN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: Spec, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids: Ids):
    out_BTNH, lse = _forward(spec, q_BTNH, k_BSKH, v_BSKH, ids)
    return out_BTNH, _join_sums(lse, q_BTNH.shape[1])


def _attend_fwd(spec: Spec, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids: Ids):
    out_BTNH, lse = _forward(spec, q_BTNH, k_BSKH, v_BSKH, ids)
    out_BTNH, lse = checkpoint_name(out_BTNH, RESIDUALS), checkpoint_name(lse, RESIDUALS)
    return (out_BTNH, _join_sums(lse, q_BTNH.shape[1])), (q_BTNH, k_BSKH, v_BSKH, ids, out_BTNH, lse)


def _attend_bwd(spec: Spec, residuals, cotangents: tuple[jax.Array, jax.Array]):
    q_BTNH, k_BSKH, v_BSKH, ids, out_BTNH, lse = residuals
    g_BTNH, g_lse_BTN = cotangents
    lse = jnp.where(lse == HIDDEN, 0.0, lse)  # whatever is finite: nothing is seen there
    grid = _grid(spec, q_BTNH.shape[1], k_BSKH.shape[1])
    K = k_BSKH.shape[2]
    q, k, v = _cut_queries(q_BTNH, K, grid), _cut_keys(k_BSKH, grid), _cut_keys(v_BSKH, grid)
    g, ids = _cut_queries(g_BTNH, K, grid), _cut_ids(ids, grid)
    # The log-sum-exp's own gradient is the probabilities, so its cotangent joins the term they are multiplied with.
    inner_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * g_BTNH.astype(jnp.float32), -1) - g_lse_BTN
    inner = _cut_queries(inner_BTN[..., None], K, grid)

    def body(i, j, carry):
        dq, dk, dv = carry
        q_i, k_j, v_j, g_i = _at(q, i), _at(k, j), _at(v, j), _at(g, i)
        s, slope = _scores(spec, q_i, k_j)
        keep = _keep(spec, grid, ids, i, j)
        p = jnp.exp(s - _at(lse, i)[..., None])
        if keep is not None:
            p = jnp.where(keep, p, 0.0)
        ds = p * (_dot("bkgch,bkdh->bkgcd", g_i, v_j) - _at(inner, i)) * spec.scale
        ds = (ds if slope is None else ds * slope).astype(q.dtype)
        return (
            _add(dq, i, _dot("bkgcd,bkdh->bkgch", ds, k_j)),
            _add(dk, j, _dot("bkgcd,bkgch->bkdh", ds, q_i)),
            _add(dv, j, _dot("bkgcd,bkgch->bkdh", p.astype(g.dtype), g_i)),
        )

    dq, dk, dv = _loop(grid, body, tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    dq_BTNH = _join_queries(dq, grid.T).astype(q.dtype)
    return dq_BTNH, _join_keys(dk, grid.S).astype(k.dtype), _join_keys(dv, grid.S).astype(v.dtype), None


def _add(x: jax.Array, i: jax.Array, y: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, _at(x, i) + y, i, 0)


_attend.defvjp(_attend_fwd, _attend_bwd)
