r"""The output head and cross-entropy as one chunked function: per-token log-probabilities, never [B, T, V] at once.

Each token's log-probability depends on its own hidden state alone, so its gradient is one row per token,
:math:`\partial \log p_t / \partial x_t = W_{y_t} - \sum_v p_{tv} W_v`. With a frozen head the forward pass computes
that row beside the value while the chunk's logits exist, and the backward pass only scales it: no logits are kept and
none are computed twice, whatever the objective does with the log-probabilities. A head that trains is recomputed
chunk by chunk in the backward pass instead.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxft.core import tree, verbs
from jaxft.core.many import Many
from jaxft.models.config import ModelConfig

LOGIT_ELEMENTS = 2**28  # largest chunk of logits, in elements
MIN_CHUNKS = 8
METRICS = ("entropy", "correct", "sum_p2")  # not differentiated: their gradients are not computed
TRAINED = ("logp", "trained_entropy")
NEEDS = (*TRAINED, *METRICS)
ROWS = ("data", "fsdp")  # mesh axes that share the rows of a batch


def head_of(config: ModelConfig, params: tree.Params) -> Any:
    """The weight that `logits` reads: the head [D, V], or the token embedding [V, D] of a tied model.

    Raises ValueError for a model that scores sequences and has no such head."""
    if config.labels:
        raise ValueError(
            f"got a model that scores sequences ({config.labels} outputs a token), which has no log-probabilities and "
            "says nothing; expected a language model: give the one it was made from"
        )
    return params["embed"]["tokens"] if config.tie_embeddings else params["head"]


def rewards(config: ModelConfig, params: tree.Params, x: jax.Array) -> jax.Array:
    """Hidden states [..., D] to the scalar that a reward model says at each, float32[...].

    The product runs in the dtype of x, as in `transformers`. Raises ValueError for a model without such a head."""
    if config.labels != 1:
        kind = f"a classifier of {config.labels} labels" if config.labels else "a language model"
        raise ValueError(
            f"got {kind}; expected a reward model, with one output: jaxft.reward_model makes one of a language model "
            "(objective.name=reward trains it)"
        )
    return (x @ params["score"])[..., 0].astype(jnp.float32)


def logits(config: ModelConfig, head: Any, x: jax.Array) -> jax.Array:
    """[..., D] -> float32[..., V], scaled and capped; the product runs in the dtype of x, as in `transformers`."""
    y = verbs.unembed(head, x) if config.tie_embeddings else x @ head
    y = y.astype(jnp.float32)
    if config.logits_scale != 1.0:
        y = y * config.logits_scale
    if config.final_softcap is not None:
        y = config.final_softcap * jnp.tanh(y / config.final_softcap)
    return y


class Statistics(Protocol):
    """What is made of a chunk of logits. A frozen dataclass: it is part of the jit key."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of what it returns."""
        ...

    @property
    def gradients(self) -> tuple[str, ...]:
        """Those of ``needs`` that are differentiated, float32[...]: one number a token."""
        ...

    def given(self, other: Any, rows: Any) -> Any:
        """What does not depend on the logits, from the other model's head and the chunk's ``rows``."""
        ...

    def __call__(self, y: jax.Array, given: Any) -> dict[str, jax.Array]:
        """From logits float32[..., V] to {need: [..., ...]}."""
        ...


@dataclass(frozen=True)
class TokenScores:
    """`token_scores` of a chunk, whose ``rows`` are its labels int32[...]."""

    needs: tuple[str, ...]
    gradients: tuple[str, ...] = ("logp",)
    temperature: float = 1.0

    def given(self, other: None, rows: jax.Array) -> jax.Array:
        return rows

    def __call__(self, y: jax.Array, given: jax.Array) -> dict[str, jax.Array]:
        y = y if self.temperature == 1.0 else y / self.temperature
        top = jax.lax.stop_gradient(jnp.max(y, -1, keepdims=True))
        lse = jnp.log(jnp.sum(jnp.exp(y - top), -1, keepdims=True)) + top
        hot = jax.lax.broadcasted_iota(jnp.int32, y.shape, y.ndim - 1) == given[..., None]
        chosen = jnp.sum(jnp.where(hot, y, 0.0), -1)
        out = {"logp": chosen - lse[..., 0]}
        if set(self.needs) & {"entropy", "trained_entropy", "sum_p2"}:
            p = jnp.exp(y - lse)
            out["entropy"] = out["trained_entropy"] = lse[..., 0] - jnp.sum(p * y, -1)
            out["sum_p2"] = jnp.sum(p * p, -1)
        if "correct" in self.needs:
            out["correct"] = (chosen >= top[..., 0]).astype(jnp.float32)
        return {n: out[n] for n in self.needs}


def token_scores(
    config: ModelConfig,
    head: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    needs: tuple[str, ...] = ("logp",),
    mesh: jax.sharding.Mesh | None = None,
    temperature: float = 1.0,
) -> dict[str, jax.Array]:
    """What an objective needs of the next-token distribution at each hidden state, float32[B, T] each.

    ``labels`` int32[B, T] is the token each state should predict (any id where it does not matter). logp: log p(label);
    entropy: nats; correct: 1 where the label is the most likely token; sum_p2: sum over the vocabulary of p squared.
    Only logp carries a gradient, and trained_entropy, which is the entropy again. The distribution is that of the
    logits divided by ``temperature``. For ``mesh`` see `over_chunks`.
    Raises ValueError for another need."""
    unknown = [n for n in needs if n not in NEEDS]
    if unknown:
        raise ValueError(f"needs: got {unknown}; expected names among {NEEDS}")
    asked = tuple(dict.fromkeys(("logp", *needs)))
    ask = TokenScores(asked, tuple(need for need in asked if need in TRAINED), temperature)
    return over_chunks(ask, config, head, x_BTD, labels_BT, mesh=mesh)


def over_chunks(
    ask: Statistics,
    config: ModelConfig,
    head: Any,
    x_BTD: jax.Array,
    rows: Any,
    other: tuple[ModelConfig, Any] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """Statistics of the logits at each hidden state, which exist for one chunk of tokens at a time: [B, T, ...] each.

    ``rows``: a tree of arrays [B, T, ...] that they are made with. ``other``: the config and head of another model,
    which ``ask.given`` reads; neither it nor ``rows`` gets a gradient. Under a ``mesh`` heads are gathered once and the
    gradient is reduced once, not for each chunk (but for a head that differs by row, which must see all of them)."""
    width = config.vocab_size + (0 if other is None else other[0].vocab_size)
    run = functools.partial(_over_chunks, ask, config, width)
    held = None if other is None else jax.lax.stop_gradient(other[1])
    shards = 1 if mesh is None else math.prod(mesh.shape[a] for a in ROWS)
    if mesh is None or shards == 1 or x_BTD.shape[0] % shards or isinstance(head, Many):
        return run(head, held, x_BTD, rows)
    # Each device has its rows: heads are gathered before all chunks and the gradient reduced after them (left to the
    # compiler, that is done for each chunk); the vocabulary stays the compiler's to share out.
    spec, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(ROWS)
    head, held = _stored(config, head, mesh), held if other is None else _stored(other[0], held, mesh)
    specs = (spec, spec, split, split)
    f = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=split, axis_names=set(ROWS), check_vma=False)
    return f(head, held, x_BTD, rows)


def _stored(config: ModelConfig, head: Any, mesh: jax.sharding.Mesh) -> Any:
    """Says how each leaf of a head lies outside, so that its gradient is scattered there at once."""
    sizes = {"fsdp": config.hidden_size, "tensor": config.vocab_size}

    def one(w: jax.Array) -> jax.Array:
        axes: list[str | None] = [None] * w.ndim
        for name, size in sizes.items():
            at = next((i for i, n in enumerate(w.shape) if n == size and axes[i] is None), None)
            if at is not None and size % mesh.shape[name] == 0:
                axes[at] = name
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.lax.with_sharding_constraint(w, place) if any(axes) else w

    return jax.tree.map(one, head)


def _over_chunks(ask: Statistics, config: ModelConfig, width: int, head: Any, held: Any, x_BTD: jax.Array, rows: Any):
    """`over_chunks` of one device's rows; ``width``: logits a token."""
    batch, length = x_BTD.shape[:2]
    wanted = max(MIN_CHUNKS, -(-batch * length * width // LOGIT_ELEMENTS))
    chunks = min(length, wanted)
    size = -(-length // chunks)

    def cut(a: jax.Array) -> jax.Array:
        """Chunks run along T, so that a batch sharded over devices stays where it is."""
        a = jnp.pad(a, ((0, 0), (0, size * chunks - length), *[(0, 0)] * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(batch, chunks, size, *a.shape[2:]), 1, 0)

    out: dict[str, jax.Array] = _scores(ask, config, head, held, cut(x_BTD), jax.tree.map(cut, rows))  # type: ignore[assignment]
    return {n: jnp.moveaxis(v, 0, 1).reshape(batch, -1, *v.shape[3:])[:, :length] for n, v in out.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(ask: Statistics, config: ModelConfig, head: Any, held: Any, x: jax.Array, rows: Any):
    """Statistics chunk by chunk: x [chunks, B, size, D], rows [chunks, B, size, ...]."""

    def chunk(_, inputs):
        x_c, rows_c = inputs
        return None, ask(logits(config, head, x_c), ask.given(held, rows_c))

    return jax.lax.scan(chunk, None, (x, rows))[1]


def _forward(ask, config, head, held, x, rows):
    """Also a gradient row for each statistic that has one if the head is frozen; else what a recomputation needs."""
    trained, frozen = tree.partition(jax.tree.map(lambda a: a.value, head), jax.tree.map(lambda a: a.perturbed, head))
    head, held, x, rows = jax.tree.map(lambda a: a.value, (head, held, x, rows))
    if jax.tree.leaves(trained):
        return _scores(ask, config, head, held, x, rows), (trained, frozen, held, x, rows, None)

    def chunk(_, inputs):
        x_c, rows_c = inputs
        y, to_x = jax.vjp(lambda x_c: logits(config, head, x_c), x_c)
        given, slopes = ask.given(held, rows_c), {}
        out = _only(ask, *(n for n in ask.needs if n not in ask.gradients))(y, given)
        for name in ask.gradients:
            out[name], to_y = jax.vjp(lambda y, name=name: _only(ask, name)(y, given)[name], y)
            (slopes[name],) = to_x(*to_y(jnp.ones_like(out[name])))
        return None, (out, slopes)

    _, (out, slopes) = jax.lax.scan(chunk, None, (x, rows))
    return out, (trained, None, None, None, None, slopes)


def _only(ask: Any, *names: str) -> Statistics:
    """The same of which only ``names`` are asked."""
    return dataclasses.replace(ask, needs=names, gradients=names)


def _backward(ask, config, residuals, cotangents):
    trained, frozen, held, x, rows, slopes = residuals
    zero = jax.custom_derivatives.SymbolicZero
    g = {name: cotangents[name] for name in ask.gradients if not isinstance(cotangents[name], zero)}
    if slopes is not None:
        d_x = [slopes[name] * g[name][..., None].astype(slopes[name].dtype) for name in g]
        return None, None, functools.reduce(jnp.add, d_x) if d_x else None, None

    def chunk(total, inputs):
        x_c, rows_c, g_c = inputs

        def score(trained, x_c):
            y = logits(config, tree.combine(trained, frozen), x_c)
            return _only(ask, *g)(y, ask.given(held, rows_c))

        _, pull = jax.vjp(score, trained, x_c)
        more, d_x = pull(g_c)
        return jax.tree.map(lambda t, d: t + d.astype(jnp.float32), total, more), d_x

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), trained)
    d_head, d_x = jax.lax.scan(chunk, zeros, (x, rows, g))
    return jax.tree.map(lambda d, w: d.astype(w.dtype), d_head, trained), None, d_x, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)
