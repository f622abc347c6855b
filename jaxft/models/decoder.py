"""One causal decoder for every family: a pure function over stacked layers.

Layers are stacked on axis 0 and scanned; layers of different kinds (local and global attention, no position encoding
every n-th) are scanned by period, their kinds static inside one period. `Execution` says how to compute, never what:
rematerialisation by name, unrolling, attention backend, mesh.

Unusual: what the backward pass keeps is chosen by name. ``save`` keeps the outputs of the large products and of the
attention kernel, so that nothing expensive is done twice, and recomputes norms, rotations and activations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.core import indexed, tree, verbs
from jaxft.core.weight import Split
from jaxft.models import attention, attention_paged, cache, rope, slots, unfold
from jaxft.models.cache import Cache
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.mlp import mlp
from jaxft.models.norm import norm
from jaxft.models.unfold import Unfold

Remat = Literal["none", "full", "offload", "attn", "save"]
KEPT: dict[str, frozenset[str]] = {
    "full": frozenset(),
    "attn": frozenset({"q", "k", "v", "attn", "adapter"}),
    "save": frozenset({"q", "k", "v", "attn", "adapter", "mid", "gate", "up"}),
}
INPUT = "input"  # of a layer
GATHERED = "gathered"  # packed weights from all devices: made again under every policy, as each layer's are large


@dataclass(frozen=True)
class Execution:
    """How a forward pass is computed; changes speed and memory, never the result beyond rounding."""

    remat: Remat = "none"
    """What the backward pass recomputes: none keeps everything, save all but the large products, full all but the
    input of each layer, and so does offload, which keeps that in the host's memory."""
    unroll: bool = False
    """A Python loop over layers instead of a scan: 4 % faster on a GPU, slower to compile."""
    backend: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto chooses by platform and case."""
    mesh: jax.sharding.Mesh | None = None
    """Device mesh with axes (data, fsdp, tensor); None: one device."""
    gather: Callable[[tree.Params], tree.Params] | None = None
    """Brings together what the mesh holds apart of one layer's packed weights, naming it `GATHERED`; None: the compiler
    does, at the dense weight's size (see `jaxft.sharding.rules.gather`)."""


DEFAULT = Execution()


def forward(
    config: ModelConfig,
    params: tree.Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: Cache | None = None,
    capture: tuple[str, ...] = (),
    *,
    execution: Execution = DEFAULT,
    noise_BTD: jax.Array | None = None,
    tasks_BT: jax.Array | None = None,
    shared: Unfold | None = None,
) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
    """Token ids int32[B, T] to the hidden states after the final norm, [B, T, D].

    ``positions`` int32[B, T] restart in each document (the default); ``segments`` int32[B, T] number the documents
    of a row from 1, 0 is padding; None promises one document per row with any padding on the right. With a cache the
    tokens are added to what it holds of their rows, at their positions: one document a row, padding (segment 0) on the
    right and not kept. ``capture``: what is also returned, by name: ``layers``, every layer's output [L, B, T, D], or
    ``layers/3``, that of one (from 0), [B, T, D].
    ``noise`` is added to the embeddings of tokens (NEFTune). With a prompt of n rows in ``params``, positions 0..n-1 of
    each document are the prompt's, whatever their tokens; with neither segments nor cache they are added here, and
    only the T given ones returned. ``tasks`` int32[B, T]: the task of each token's document, for a multitask prompt.
    ``shared``: rows of T tokens in which two sequences have one prompt."""
    wanted = _captured(config, capture)
    if positions_BT is None:
        positions_BT = restarting(tokens_BT, segments_BT)
    added = slots.prompt_length(params) if segments_BT is None and cache is None else 0
    if added:
        tokens_BT, positions_BT, noise_BTD, tasks_BT = slots.prepend(
            added, tokens_BT, positions_BT, noise_BTD, tasks_BT
        )
    how = {"execution": execution, "noise_BTD": noise_BTD, "tasks_BT": tasks_BT}
    x_BTD = embed(config, params, tokens_BT, positions_BT, segments_BT, **how)
    positions_BT = positions_BT + slots.prefix_length(params)
    context = _Context(config, execution, positions_BT, segments_BT, cache, shared)
    x_BTD, cache, outputs = _layers(context, slots.layers(params, x_BTD.dtype), x_BTD, wanted)
    captured = {}
    for name in capture:
        found = outputs if name == "layers" else outputs[wanted.index(int(name.removeprefix("layers/")))]
        captured[name] = found[..., added:, :]
    return norm(config, params["final_norm"], x_BTD[:, added:]), cache, captured


def _captured(config: ModelConfig, capture: tuple[str, ...]) -> tuple[int, ...]:
    """The layers whose outputs are asked for, in order."""
    known = {f"layers/{i}": i for i in range(config.num_layers)}
    refused = set(capture) - {"layers", *known}
    if refused:
        last = config.num_layers - 1
        raise ValueError(f"capture: got {sorted(refused)}; expected 'layers', or 'layers/0' to 'layers/{last}'")
    return tuple(known.values()) if "layers" in capture else tuple(sorted({known[name] for name in capture}))


def embed(
    config: ModelConfig,
    params: tree.Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    execution: Execution = DEFAULT,
    noise_BTD: jax.Array | None = None,
    tasks_BT: jax.Array | None = None,
) -> jax.Array:
    """What the first layer reads, [B, T, D]; arguments as of `forward`."""
    x_BTD = _features(execution, verbs.take(params["embed"]["tokens"], tokens_BT))
    x_BTD = _scaled(config.embed_scale, x_BTD)
    if noise_BTD is not None:
        x_BTD = x_BTD + noise_BTD.astype(x_BTD.dtype)
    if slots.PROMPT in params:
        x_BTD = slots.fill(params[slots.PROMPT], x_BTD, positions_BT, segments_BT, tasks_BT)
    x_BTD = _scaled(config.input_scale, x_BTD)
    if config.learned_positions:
        x_BTD = x_BTD + verbs.take(params["embed"]["positions"], positions_BT + slots.prefix_length(params))
    return _rows(execution, x_BTD)


def layer(
    config: ModelConfig,
    kind: Layer,
    params: tree.Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    execution: Execution = DEFAULT,
) -> jax.Array:
    """One layer by itself, of a kind of ``config.layers`` and with the parameters of that layer: [B, T, D]."""
    context = _Context(config, execution, positions_BT, segments_BT, None)
    return _layer(context, kind, params, x_BTD, None, 0)[0]


def restarting(tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """The default positions int32[B, T]: from 0 in each row, or wherever the segment changes."""
    at_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    if segments_BT is None:
        return at_BT
    starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return at_BT - jax.lax.cummax(jnp.where(starts_BT, at_BT, 0), axis=1)


def _scaled(scale: float, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if scale == 1.0 else x_BTD * jnp.asarray(scale, x_BTD.dtype)


def _rows(execution: Execution, x_BTD: jax.Array) -> jax.Array:
    """Keeps activations sharded by rows over the data axes, so that the compiler gathers weights and not them."""
    return _constrain(execution, x_BTD, (("data", "fsdp"), (), ()))


def _features(execution: Execution, x_BTD: jax.Array) -> jax.Array:
    """What the look-up in a table with sharded features gives, before it is exchanged for rows.

    Said aloud, since the compiler otherwise finds no way from one to the other but a copy of all rows everywhere."""
    return _constrain(execution, x_BTD, (("data",), (), ("fsdp",)))


def _constrain(execution: Execution, x: jax.Array, axes: tuple[tuple[str, ...], ...]) -> jax.Array:
    """Shards each axis of ``x`` over mesh axes, where all divide; left to the compiler otherwise."""
    mesh = execution.mesh
    if mesh is None or any(n % math.prod(mesh.shape[a] for a in over) for n, over in zip(x.shape, axes, strict=True)):
        return x
    spec = jax.sharding.PartitionSpec(*(over or None for over in axes))
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))


class _Context:
    """What every layer of one pass shares: rotary tables, positions and segments of queries and keys."""

    def __init__(
        self,
        config: ModelConfig,
        execution: Execution,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        cached: Cache | None,
        shared: Unfold | None = None,
    ):
        self.config, self.execution, self.shared = config, execution, shared
        self.tables = [rope.table(r, positions_BT) for r in config.ropes]
        if shared is not None:
            positions_BT, segments_BT = unfold.whole(positions_BT, shared), shared.segments
        self.positions_BT, self.segments_BT, self.cache = positions_BT, segments_BT, cached

    @property
    def kept_BT(self) -> jax.Array:
        """bool[B, T]: the token is one, and no padding."""
        segments_BT = self.segments_BT
        return jnp.ones(self.positions_BT.shape, bool) if segments_BT is None else segments_BT > 0


def unrolls(config: ModelConfig, params: tree.Params, execution: Execution) -> bool:
    """Whether the layers are a Python loop, rather than a scan."""
    return _unrolls(config, params["layers"], execution)


def _unrolls(config: ModelConfig, stack: tree.Params, execution: Execution) -> bool:
    split = any(isinstance(a, Split) for a in jax.tree.leaves(stack, is_leaf=lambda a: isinstance(a, Split)))
    return execution.unroll or split or config.period == config.num_layers  # a loop of one turn is none


def _layers(
    context: _Context, stack: tree.Params, x_BTD: jax.Array, capture: tuple[int, ...]
) -> tuple[jax.Array, Cache | None, Any]:
    """All layers, scanned by period or unrolled: (x, cache, outputs[len(capture), B, T, D] or None)."""
    config, execution = context.config, context.execution
    unroll = _unrolls(config, stack, execution)
    outputs, held = [], context.cache

    def one(kind: Layer):
        def body(x, p, cached, i):
            return _layer(context, kind, p, x, cached, i)

        recomputes = execution.remat != "none" or execution.gather is not None
        whole = held is not None or not recomputes  # a cache means no gradient, and wants to know its layer
        return body if whole else _remat(body, execution.remat, prevent_cse=unroll)

    if unroll:
        for i, kind in enumerate(config.layers):
            x_BTD, held = one(kind)(x_BTD, tree.layer(stack, i), held, i)
            outputs += [x_BTD] if i in capture else []
        return x_BTD, held, jnp.stack(outputs) if capture else None

    period = config.period
    sliced, whole = tree.hold_shared(stack if held is None else indexed.in_place(stack))  # a cache means no gradient
    # a place for each that is asked for, and one that all others overwrite
    kept = jnp.zeros((len(capture) + 1, *x_BTD.shape), x_BTD.dtype) if capture else None
    places = jnp.array([capture.index(i) if i in capture else len(capture) for i in range(config.num_layers)])

    def block(carry, inputs):
        (x, cached, kept), (part, i) = carry, inputs
        p = whole(part)
        for j, kind in enumerate(config.layers[:period]):
            at = i * period + j
            own = indexed.at(tree.layer(p, j) if period > 1 else p, at)
            x, cached = one(kind)(x, own, cached, at)
            kept = kept if kept is None else jax.lax.dynamic_update_index_in_dim(kept, x, places[at], 0)
        return (x, cached, kept), None

    blocks = config.num_layers // period
    if period > 1:
        sliced = jax.tree.map(lambda a: a.reshape(blocks, period, *a.shape[1:]), sliced)
    (x_BTD, held, kept), _ = jax.lax.scan(block, (x_BTD, held, kept), (sliced, jnp.arange(blocks)))
    return x_BTD, held, None if kept is None else kept[:-1]


def _remat(body, policy: Remat, prevent_cse: bool):
    """Rematerialisation of one layer."""
    return jax.checkpoint(body, policy=_rule(policy), prevent_cse=prevent_cse)


def _rule(policy: Remat) -> Callable[..., Any]:
    """What is kept; the fused attention kernel's own outputs are wherever any product is."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return policies.save_anything_except_these_names(GATHERED)
    if policy == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    by_name = policies.save_only_these_names(*KEPT[policy])

    def keep(primitive, *args, **params):
        return "dot_product_attention_fwd" in primitive.name or by_name(primitive, *args, **params)

    return keep if KEPT[policy] else policies.nothing_saveable


def _layer(context: _Context, kind: Layer, p: tree.Params, x_BTD: jax.Array, cached: Cache | None, i: Any):
    """One decoder layer: (x, cache)."""
    config, x_BTD = context.config, checkpoint_name(x_BTD, INPUT)
    if context.execution.gather is not None:
        p = context.execution.gather(p)
    scale = config.residual_scale

    def before(name: str, y):
        return norm(config, p[name], y) if config.pre_norm else y

    def after(name: str, y):
        y = norm(config, p[name], y) if config.post_norm else y
        return y if scale == 1.0 else y * jnp.asarray(scale, y.dtype)

    with jax.named_scope("attention"):
        a_BTD, cached = _attend(context, kind, p["attn"], before("attn_norm", x_BTD), cached, i, p.get(slots.PREFIX))
        a_BTD = after("attn_post_norm", a_BTD)
    mid_BTD = x_BTD + a_BTD
    if not config.parallel_residual:
        x_BTD = mid_BTD = checkpoint_name(mid_BTD, "mid")
    with jax.named_scope("mlp"):
        y_BTD = mid_BTD + after("mlp_post_norm", mlp(config, p["mlp"], before("mlp_norm", x_BTD)))
        return _rows(context.execution, _adapters(p, mid_BTD, y_BTD)), cached


def _adapters(p: tree.Params, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """The stream after a layer with what bottleneck adapters add: one reads it before the feed-forward, one after."""
    if "parallel_adapter" in p:
        y_BTD = y_BTD + x_BTD @ p["parallel_adapter"]
    return y_BTD + y_BTD @ p["adapter"] if "adapter" in p else y_BTD


def _attend(
    context: _Context,
    kind: Layer,
    p: tree.Params,
    x_BTD: jax.Array,
    cached: Cache | None,
    i: Any,
    prefix: jax.Array | None,
):
    """Self-attention with its projections: (out_BTD, cache). ``prefix``: keys and values [2, n, K, H]."""
    config = context.config
    q_BTNH, k_BTKH, v_BTKH = _project(config, p, x_BTD)
    table = None if kind.rope is None else context.tables[kind.rope]
    scale = kind.score_scale * (config.head_dim**-0.5 if config.attn_scale is None else config.attn_scale)
    if cached is not None and not cached.fresh:
        scores = attention_paged.Scores(scale, kind.window, config.attn_softcap)
        given = (q_BTNH, k_BTKH, v_BTKH, context.positions_BT, context.kept_BT, scores, context.execution.mesh, table)
        o_BTNH, cached = attention_paged.attend(cached, i, *given)
        return o_BTNH.reshape(*x_BTD.shape[:2], -1) @ p["o"], cached
    if table is not None:
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, *table), rope.rotate(k_BTKH, *table)
    q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(a, n) for a, n in ((q_BTNH, "q"), (k_BTKH, "k"), (v_BTKH, "v")))
    if context.shared is not None:
        q_BTNH, k_BTKH, v_BTKH = (unfold.whole(a, context.shared) for a in (q_BTNH, k_BTKH, v_BTKH))
    if cached is not None:
        cached = _remembered(context, cached, i, k_BTKH, v_BTKH, prefix)
    segments_BT = context.segments_BT if cached is None else None  # fresh rows are padded on the right
    o_BTNH = attention.attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_positions_BT=context.positions_BT,
        k_positions_BS=context.positions_BT,
        q_segments_BT=segments_BT,
        k_segments_BS=segments_BT,
        scale=scale,
        window=kind.window,
        softcap=config.attn_softcap,
        backend=context.execution.backend,
        mesh=context.execution.mesh,
        prefix=None if prefix is None else (prefix[0], prefix[1]),
    )
    if context.shared is not None:
        o_BTNH = unfold.back(o_BTNH, context.shared)
    return o_BTNH.reshape(*x_BTD.shape[:2], -1) @ p["o"], cached


def _remembered(
    context: _Context, cached: Cache, i: Any, k_BTKH: jax.Array, v_BTKH: jax.Array, prefix: jax.Array | None
) -> Cache:
    """The cache of fresh rows with the tokens' keys and values of layer i, and before the first those of a prefix."""
    if prefix is not None:
        B, n = k_BTKH.shape[0], prefix.shape[1]
        at_BP = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (B, n))
        keep_BP = jnp.broadcast_to(jnp.any(context.kept_BT, axis=1, keepdims=True), (B, n))
        each = (jnp.broadcast_to(a, (B, *a.shape)) for a in prefix)
        cached = cache.write(cached, i, at_BP, keep_BP, *each)
    return cache.write(cached, i, context.positions_BT, context.kept_BT, k_BTKH, v_BTKH)


def _project(config: ModelConfig, p: tree.Params, x_BTD: jax.Array):
    """Queries [B, T, N, H], keys and values [B, T, K, H], normalised where the family does."""
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    rows = x_BTD.shape[:2]
    if config.qkv == "blocks":
        q, key, v = jnp.split(x_BTD @ p["qkv"], [n * h, (n + k) * h], -1)
    elif config.qkv == "heads":
        q, key, v = (a.reshape(*rows, -1) for a in jnp.split((x_BTD @ p["qkv"]).reshape(*rows, n, 3 * h), 3, -1))
    else:
        q, key, v = x_BTD @ p["q"], x_BTD @ p["k"], x_BTD @ p["v"]
    if config.qk_norm == "whole":
        q, key = norm(config, p["q_norm"], q), norm(config, p["k_norm"], key)
    q, key, v = q.reshape(*rows, n, h), key.reshape(*rows, k, h), v.reshape(*rows, k, h)
    if config.qk_norm == "head":
        q, key = norm(config, p["q_norm"], q), norm(config, p["k_norm"], key)
    return q, key, v
