r"""The output head and cross-entropy as one chunked function: per-token log-probabilities, never [B, T, V] at once.

Each token's log-probability depends on its own hidden state alone, so its gradient is one row per token,
:math:`\partial \log p_t / \partial x_t = W_{y_t} - \sum_v p_{tv} W_v`. With a frozen head the forward pass computes
that row beside the value while the chunk's logits exist, and the backward pass only scales it: no logits are kept and
none are computed twice, whatever the objective does with the log-probabilities. A head that trains is recomputed
chunk by chunk in the backward pass instead.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree, verbs
from jaxft.core.many import Many
from jaxft.models.config import ModelConfig

LOGIT_ELEMENTS = 2**28  # largest chunk of logits, in elements
MIN_CHUNKS = 8
METRICS = ("entropy", "correct", "sum_p2")  # not differentiated: their gradients are not computed
NEEDS = ("logp", *METRICS)
ROWS = ("data", "fsdp")  # mesh axes that share the rows of a batch


def head_of(config: ModelConfig, params: tree.Params) -> Any:
    """The weight that `logits` reads: the head [D, V], or the token embedding [V, D] of a tied model."""
    return params["embed"]["tokens"] if config.tie_embeddings else params["head"]


def logits(config: ModelConfig, head: Any, x: jax.Array) -> jax.Array:
    """[..., D] -> float32[..., V], scaled and capped; the product runs in the dtype of x, as in `transformers`."""
    y = verbs.unembed(head, x) if config.tie_embeddings else x @ head
    y = y.astype(jnp.float32)
    if config.logits_scale != 1.0:
        y = y * config.logits_scale
    if config.final_softcap is not None:
        y = config.final_softcap * jnp.tanh(y / config.final_softcap)
    return y


def token_scores(
    config: ModelConfig,
    head: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    needs: tuple[str, ...] = ("logp",),
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """What an objective needs of the next-token distribution at each hidden state, float32[B, T] each.

    ``labels`` int32[B, T] is the token each state should predict (any id where it does not matter). logp: log p(label);
    entropy: nats; correct: 1 where the label is the most likely token; sum_p2: sum over the vocabulary of p squared.
    Only logp carries a gradient. Under a ``mesh`` the head is gathered once and its gradient reduced once, not for
    each chunk (but for a head that differs by row, which must see all of them). Raises ValueError for another need."""
    unknown = [n for n in needs if n not in NEEDS]
    if unknown:
        raise ValueError(f"needs: got {unknown}; expected names among {NEEDS}")
    run = functools.partial(_token_scores, config, tuple(needs))
    shards = 1 if mesh is None else math.prod(mesh.shape[a] for a in ROWS)
    if mesh is None or shards == 1 or labels_BT.shape[0] % shards or isinstance(head, Many):
        return run(head, x_BTD, labels_BT)
    return _sharded(config, run, head, x_BTD, labels_BT, mesh)


def _sharded(config: ModelConfig, run: Any, head: Any, x_BTD: jax.Array, labels_BT: jax.Array, mesh: jax.sharding.Mesh):
    """`run` on each device's rows: the head is gathered before all chunks and its gradient reduced after them (left to
    the compiler, that is done for each chunk); the vocabulary stays the compiler's to share out."""
    spec, rows = jax.sharding.PartitionSpec, jax.sharding.PartitionSpec(ROWS)

    def stored(w: jax.Array) -> jax.Array:
        """Says how a leaf lies outside, so that its gradient is scattered there at once."""
        sizes = {"fsdp": config.hidden_size, "tensor": config.vocab_size}
        axes: list[str | None] = [None] * w.ndim
        for name, size in sizes.items():
            at = next((i for i, n in enumerate(w.shape) if n == size and axes[i] is None), None)
            if at is not None and size % mesh.shape[name] == 0:
                axes[at] = name
        place = jax.sharding.NamedSharding(mesh, spec(*axes))
        return jax.lax.with_sharding_constraint(w, place) if any(axes) else w

    specs = (spec(), rows, rows)
    f = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, axis_names=set(ROWS), check_vma=False)
    return f(jax.tree.map(stored, head), x_BTD, labels_BT)


def _token_scores(config: ModelConfig, needs: tuple[str, ...], head: Any, x_BTD: jax.Array, labels_BT: jax.Array):
    """`token_scores` of one device's rows."""
    batch, length = labels_BT.shape
    wanted = max(MIN_CHUNKS, -(-batch * length * config.vocab_size // LOGIT_ELEMENTS))
    chunks = min(length, wanted)
    size = -(-length // chunks)
    pad = size * chunks - length
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, pad), (0, 0)))
    labels_BT = jnp.pad(labels_BT, ((0, 0), (0, pad)))
    # Chunks run along T, so that a batch sharded over devices stays where it is.
    x = jnp.moveaxis(x_BTD.reshape(batch, chunks, size, -1), 1, 0)
    labels = jnp.moveaxis(labels_BT.reshape(batch, chunks, size), 1, 0)
    out: dict[str, jax.Array] = _scores(config, needs, head, x, labels)  # type: ignore[assignment]
    return {n: jnp.moveaxis(v, 0, 1).reshape(batch, -1)[:, :length] for n, v in out.items()}


def _statistics(config: ModelConfig, needs: tuple[str, ...], head: Any, x: jax.Array, labels: jax.Array):
    """Scores of one chunk and its logits: ({need: float32[...]}, logits, lse)."""
    y = logits(config, head, x)
    top = jax.lax.stop_gradient(jnp.max(y, -1, keepdims=True))
    lse = jnp.log(jnp.sum(jnp.exp(y - top), -1, keepdims=True)) + top
    hot = jax.lax.broadcasted_iota(jnp.int32, y.shape, y.ndim - 1) == labels[..., None]
    chosen = jnp.sum(jnp.where(hot, y, 0.0), -1)
    out = {"logp": chosen - lse[..., 0]}
    if set(needs) & {"entropy", "sum_p2"}:
        p = jnp.exp(y - lse)
        out["entropy"] = lse[..., 0] - jnp.sum(p * y, -1)
        out["sum_p2"] = jnp.sum(p * p, -1)
    if "correct" in needs:
        out["correct"] = (chosen >= top[..., 0]).astype(jnp.float32)
    return {n: v if n == "logp" else jax.lax.stop_gradient(v) for n, v in out.items() if n in needs or n == "logp"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(config: ModelConfig, needs: tuple[str, ...], head: Any, x: jax.Array, labels: jax.Array):
    """Scores chunk by chunk: x [chunks, B, size, D], labels int32[chunks, B, size]."""

    def chunk(_, inputs):
        return None, _statistics(config, needs, head, *inputs)

    return jax.lax.scan(chunk, None, (x, labels))[1]


def _forward(config, needs, head, x, labels):
    """Also the gradient row of each log-probability if the head is frozen; else what a recomputation needs."""
    trained, frozen = tree.partition(jax.tree.map(lambda a: a.value, head), jax.tree.map(lambda a: a.perturbed, head))
    head, x, labels = jax.tree.map(lambda a: a.value, (head, x, labels))
    if jax.tree.leaves(trained):
        return _scores(config, needs, head, x, labels), (trained, frozen, x, labels, None)

    def chunk(_, inputs):
        x_c, labels_c = inputs
        logp, pull, rest = jax.vjp(
            lambda x_c: _split(_statistics(config, needs, head, x_c, labels_c)), x_c, has_aux=True
        )
        (row,) = pull(jnp.ones_like(logp))
        return None, ({"logp": logp, **rest}, row)

    _, (out, rows) = jax.lax.scan(chunk, None, (x, labels))
    return out, (trained, None, None, labels, rows)


def _split(out: dict[str, jax.Array]):
    return out["logp"], {n: v for n, v in out.items() if n != "logp"}


def _backward(config, needs, residuals, cotangents):
    trained, frozen, x, labels, rows = residuals
    g = cotangents["logp"]
    g = jnp.zeros(labels.shape, jnp.float32) if isinstance(g, jax.custom_derivatives.SymbolicZero) else g
    if rows is not None:
        return None, rows * g[..., None].astype(rows.dtype), None

    def chunk(total, inputs):
        x_c, labels_c, g_c = inputs

        def score(trained, x_c):
            return _statistics(config, (), tree.combine(trained, frozen), x_c, labels_c)["logp"]

        _, pull = jax.vjp(score, trained, x_c)
        more, d_x = pull(g_c)
        return jax.tree.map(lambda t, d: t + d.astype(jnp.float32), total, more), d_x

    zero = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), trained)
    d_head, d_x = jax.lax.scan(chunk, zero, (x, labels, g))
    return jax.tree.map(lambda d, w: d.astype(w.dtype), d_head, trained), d_x, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)
