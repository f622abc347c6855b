"""The training step: one jitted pure function ``(state, frozen, batch) -> (state, metrics)``.

Unusual: a term's weight is summed over all micro-batches *before* any gradient is taken, by calling the objective on
the whole batch with scores of zeros (XLA removes all but the weights). Each micro-batch then contributes the gradient
of ``sum over terms of total / weight of the whole batch``, so accumulation changes nothing but memory. A loss or
gradient that is not finite leaves the state as it was, inside the compiled step; only the step counter moves on.

Several runs can be one step (`sweep`): their states stacked on a leading axis. Only the score, which then is of all
members, knows of it; whatever is written for one member goes through ``each``, which maps it over them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxft.core import hooks as hooks_
from jaxft.core import tree
from jaxft.core.hooks import Hooks
from jaxft.objectives import terms
from jaxft.objectives.terms import Batch, Means, Objective, Scores
from jaxft.training.optim import Optimizer
from jaxft.training.state import TrainState

Metrics = dict[str, jax.Array]
Each = Callable[[Callable], Callable]
"""Maps a function of one member's arrays over members; the function itself where there is one run."""
Step = Callable[[TrainState, tree.Params, Batch], tuple[TrainState, Metrics]]


ON_GPU: Any = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
"""Products by cuBLAS as it chooses itself. On an H200 a step of 8B took as long in bf16 and NF4 and less in fp8, whose
operands Triton transposed slowly; compiling is shorter and needs no memory for trials beside the model (0.6 GiB)."""


class Score(Protocol):
    """What the models say about a batch. The training room sees models only through this."""

    def __call__(
        self, view: str, params: tree.Params, batch: Batch, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """``key=None`` is evaluation: no dropout, no noise. Values are float32[rows, T], or bool."""
        ...


class Shardings(NamedTuple):
    """Where the step's arguments live: a tree of shardings each, or one sharding for the whole of it."""

    state: Any
    frozen: Any
    batch: Any
    """For arrays [accumulate, rows, T]: rows over the data axes."""


def alone(fn: Callable) -> Callable:
    """`Each` of a single run."""
    return fn


def make_step(
    objective: Objective,
    config: Any,
    score: Score,
    optimizer: Optimizer,
    shardings: Shardings | None = None,
    hooks: Hooks = hooks_.NONE,
) -> Step:
    """Builds the training step.

    The result takes ``batch`` arrays [accumulate, rows, T], donates ``state``, and returns scalars on the device:
    ``loss``, each metric of the objective, each term as ``loss/<term>`` where there are several, ``grad_norm`` (before
    clipping), ``learning_rate``, ``tokens`` (those that are not padding), ``skipped`` (0 or 1).
    """
    return compiled(body(objective, config, score, optimizer, hooks=hooks), shardings)


def compiled(step: Step, shardings: Shardings | None = None) -> Step:
    """The jitted step, which donates its state."""
    options = ON_GPU if jax.default_backend() == "gpu" else None
    if shardings is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)
    return jax.jit(
        step, donate_argnums=0, in_shardings=(shardings.state, shardings.frozen, shardings.batch),
        out_shardings=(shardings.state, None), compiler_options=options,
    )  # fmt: skip


def body(
    objective: Objective,
    config: Any,
    score: Score,
    optimizer: Optimizer,
    each: Each = alone,
    hooks: Hooks = hooks_.NONE,
) -> Step:
    """`make_step`, not compiled. With ``each`` all metrics and the state's arrays are [members, ...], the batch's are
    [accumulate, members, rows, T], and ``score``, ``optimizer`` and ``hooks`` are those of all members."""
    objective = dataclasses.replace(objective, fn=_mapped(objective.fn, each))

    def step(state: TrainState, frozen: tree.Params, batch: Batch) -> tuple[TrainState, Metrics]:
        weights = _weights(objective, config, score, state, frozen, batch)
        key = each(jax.random.fold_in)(state.key, state.step)

        def loss_fn(trainable, micro, key):
            scores = _scores(objective, score, trainable, state.start, frozen, micro, key)
            losses, metrics = objective.fn(config, scores, micro, state.carry)
            loss = sum((terms.divide(m.total, weights[name]) for name, m in losses.items()), jnp.float32(0))
            return jnp.sum(loss), (losses, metrics)  # members share nothing that trains: each has its own gradient

        grads, (losses, means) = _accumulate(loss_fn, state.trainable, batch, key, each)
        grads = hooks.gradients(state.trainable, grads)
        metrics = _metrics(losses, means, weights)
        metrics["grad_norm"] = each(optax.tree.norm)(grads)
        metrics["learning_rate"] = optimizer.learning_rate(state.step)
        metrics["tokens"] = _tokens(batch)
        fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["skipped"] = 1 - fine.astype(jnp.int32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, state.step, fine)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, method_state = hooks.update(state.step + 1, trainable, grads, state.method_state)
        new = {"trainable": trainable, "method_state": method_state}
        old = {name: getattr(state, name) for name in new}
        return state._replace(step=state.step + 1, opt_state=opt_state, **each(_chosen)(fine, new, old)), metrics

    return step


def _chosen(fine: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)


def _mapped(fn: Callable, each: Each) -> Callable:
    """An objective's function with everything but its settings mapped over members."""
    return lambda config, *arrays: each(functools.partial(fn, config))(*arrays)


def make_eval_step(
    objective: Objective, config: Any, score: Score, each: Each = alone
) -> Callable[[tree.Params, tree.Params | None, tree.Params, Batch], Means]:
    """Builds ``(trainable, start, frozen, batch [accumulate, rows, T]) -> sums`` of each metric and term.

    No dropout, no noise, no gradient. A term ``name`` is summed as ``loss/name``. For ``each`` see `body`."""
    objective = dataclasses.replace(objective, fn=_mapped(objective.fn, each))

    def step(trainable: tree.Params, start: tree.Params | None, frozen: tree.Params, batch: Batch) -> Means:
        def one(micro: Batch) -> Means:
            scores = _scores(objective, score, trainable, start, frozen, micro, None)
            losses, metrics = objective.fn(config, scores, micro, {})
            return {**{f"loss/{name}": mean for name, mean in losses.items()}, **metrics}

        return jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.lax.map(one, batch))

    return jax.jit(step)


def _scores(
    objective: Objective, score: Score, trainable: Any, start: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> Scores:
    """Scores of every view the objective asks for; only the policy has a gradient, dropout and noise."""
    scores = {}
    for view in objective.views:
        with jax.named_scope(view):
            if view == "policy":
                scores[view] = score(view, tree.combine(trainable, frozen), batch, key)
            elif view == "reference":
                scores[view] = jax.lax.stop_gradient(score(view, tree.combine(start, frozen), batch, None))
            else:
                raise ValueError(f"no parameters for the view {view!r}; the step knows policy and reference")
    return scores


def _weights(
    objective: Objective, config: Any, score: Score, state: TrainState, frozen: Any, batch: Batch
) -> dict[str, jax.Array]:
    """Weight of each term over the whole batch [accumulate, rows, T]; nothing is scored."""

    def one(micro: Batch) -> dict[str, jax.Array]:
        shapes = jax.eval_shape(
            lambda micro: _scores(objective, score, state.trainable, state.start, frozen, micro, None), micro
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        losses, _ = objective.fn(config, zeros, micro, state.carry)
        return {name: mean.weight for name, mean in losses.items()}

    per_micro = jax.vmap(one)(batch)
    return {name: jnp.sum(weight, axis=0) for name, weight in per_micro.items()}


def _accumulate(loss_fn: Any, trainable: tree.Params, batch: Batch, key: jax.Array, each: Each) -> Any:
    """Sums gradients (float32) and the objective's sums over micro-batches, one after the other."""
    value = jax.grad(loss_fn, has_aux=True)
    fold = lambda index: each(lambda k: jax.random.fold_in(k, index))(key)  # noqa: E731
    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        return value(trainable, jax.tree.map(lambda a: a[0], batch), fold(0))

    def body(grads, indexed):
        index, micro = indexed
        more, sums = value(trainable, micro, fold(index))
        return jax.tree.map(jnp.add, grads, more), sums

    grads, sums = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, trainable), (jnp.arange(count), batch))
    return grads, jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)


def _metrics(losses: Means, means: Means, weights: dict[str, jax.Array]) -> Metrics:
    each = {name: terms.divide(mean.total, weights[name]) for name, mean in losses.items()}
    several = {f"loss/{name}": value for name, value in each.items()} if len(each) > 1 else {}
    return {"loss": sum(each.values(), jnp.float32(0)), **several, **terms.values(means)}


def _tokens(batch: Batch) -> jax.Array:
    """Tokens that are not padding. Without segments a row is one document, whose last position tells its length."""
    if "segments" in batch:
        return jnp.sum(batch["segments"] > 0, dtype=jnp.int32)
    if "positions" in batch:
        last = jnp.max(batch["positions"], axis=-1)
        return jnp.sum(jnp.where(last > 0, last + 1, 0), dtype=jnp.int32)
    return jnp.int32(batch["tokens"].size)
