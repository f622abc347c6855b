"""The training step: one jitted pure function ``(state, frozen, batch) -> (state, metrics)``.

Unusual: a term's weight is summed over all micro-batches *before* any gradient is taken, by calling the objective on
the whole batch with scores of zeros (XLA removes all but the weights). Each micro-batch then contributes the gradient
of ``sum over terms of total / weight of the whole batch``, so accumulation changes nothing but memory. What couples the
rows of a batch is found beforehand, by a pass over all of it without a gradient (`Objective.annotate`); a step of one
micro-batch has no need of that pass. A loss or
gradient that is not finite leaves the state as it was, inside the compiled step; only the step counter moves on.

Several runs can be one step (`sweep`): their states stacked on a leading axis. Only the score, which then is of all
members, knows of it; whatever is written for one member goes through ``each``, which maps it over them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxft.core import hooks as hooks_
from jaxft.core import tree
from jaxft.core.hooks import Hooks
from jaxft.objectives import terms
from jaxft.objectives.terms import Asked, Batch, Carry, Follow, Means, Objective, Scores
from jaxft.training import by_source
from jaxft.training.optim import Optimizer
from jaxft.training.state import TrainState

Metrics = dict[str, jax.Array]
Each = Callable[[Callable], Callable]
"""Maps a function of one member's arrays over members; the function itself where there is one run."""


ON_GPU: Any = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
"""Products by cuBLAS as it chooses itself. On an H200 a step of 8B took as long in bf16 and NF4 and less in fp8, whose
operands Triton transposed slowly; compiling is shorter and needs no memory for trials beside the model (0.6 GiB)."""


class Models(NamedTuple):
    """Frozen parameters where the step scores other models besides the one that trains."""

    base: tree.Params
    """Those of the model that trains."""
    others: dict[str, tree.Params]
    """Whole models by the view that they are scored as."""


Frozen = tree.Params | Models
Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
"""``(state, frozen: Frozen, batch)``."""


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
    ``loss``, each metric of the objective, each term as ``loss/<term>`` where there are several, each penalty on the
    parameters as ``penalty/<name>`` (no part of the loss), ``grad_norm`` (before clipping), ``learning_rate``,
    ``tokens`` (those that are not padding), ``skipped`` (0 or 1).
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
    objective, asked, follow = _mapped(objective, each), objective.asked(config), objective.follow(config)
    scored = functools.partial(_scores, asked, score)
    if follow is not None and optimizer.penalty is not None:
        raise ValueError("optim.l2_start, optim.ewc: they pull to the start, which this objective's reference moves")

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        key = each(jax.random.fold_in)(state.key, state.step)
        fold = lambda index: each(lambda k: jax.random.fold_in(k, index))(key)  # noqa: E731
        about = functools.partial(scored, start=state.start, frozen=frozen)
        apart = functools.partial(_asides, asked, score, state.trainable, state.start, frozen)
        annotate = objective.annotation(config)
        count, carry, aside = jax.tree.leaves(batch)[0].shape[0], state.carry, {}
        if annotate is not None and count == 1:
            aside = apart(jax.tree.map(lambda a: a[0], dict(batch)))
        elif annotate is not None:
            refuse_members(each)

            def one(indexed: Any) -> Scores:
                index, micro = indexed
                return about(state.trainable, micro, fold(index)) | apart(micro)

            found = jax.lax.stop_gradient(jax.lax.map(one, (jnp.arange(count), batch)))
            batch, carry = _annotated(annotate, found, batch, carry)

        def terms_of(scores: Scores, micro: Batch, carry: Carry) -> tuple[Means, Means, Carry]:
            if annotate is not None and count == 1:
                added, carry = annotate(jax.lax.stop_gradient(dict(scores)) | aside, micro, carry)
                micro = dict(micro) | added
            return *objective.fn(config, scores, micro, carry), carry

        weights = _weights(terms_of, lambda micro: about(state.trainable, micro, None), batch, carry)

        def loss_fn(trainable, micro, key):
            losses, metrics, after = terms_of(about(trainable, micro, key), micro, carry)
            loss = sum((terms.divide(m.total, weights[name]) for name, m in losses.items()), jnp.float32(0))
            return jnp.sum(loss), ((losses, metrics), after)  # members share nothing that trains: each has its gradient

        grads, (losses, means), carry = _accumulate(loss_fn, state.trainable, batch, fold)
        grads = hooks.gradients(state.trainable, grads)
        metrics = _metrics(losses, means, weights)
        if optimizer.penalty is not None:
            grads, penalties = optimizer.penalty(state.trainable, grads, state.start, state.fisher)
            metrics |= penalties
        metrics["grad_norm"] = each(optax.tree.norm)(grads)
        metrics["learning_rate"] = optimizer.learning_rate(state.step)
        metrics["tokens"] = jnp.sum(by_source.row_tokens(batch))
        fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["skipped"] = 1 - fine.astype(jnp.int32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, state.step, fine)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, method_state = hooks.update(state.step + 1, trainable, grads, state.method_state)
        start = state.start
        if follow is not None:
            start = each(functools.partial(_followed, follow))(state.step + 1, start, trainable)
        new = {"trainable": trainable, "start": start, "method_state": method_state, "carry": carry}
        old = {name: getattr(state, name) for name in new}
        return state._replace(step=state.step + 1, opt_state=opt_state, **each(_chosen)(fine, new, old)), metrics

    return step


def refuse_members(each: Each) -> None:
    """Raises ValueError for several runs as one, where an objective couples the micro-batches of a step."""
    if each is not alone:
        raise ValueError(
            "train.accumulate: this objective looks at all rows of a step at once, which a sweep does only where they "
            "are one micro-batch; set train.accumulate=1, or train the members one by one"
        )


def _annotated(annotate: Callable, scores: Scores, batch: Batch, carry: Carry) -> tuple[Batch, Carry]:
    """The batch [accumulate, rows, ...] with what ``annotate`` finds in all of it, and the next carry."""
    count, rows = jax.tree.leaves(batch)[0].shape[:2]
    merge = lambda a: a.reshape(count * rows, *a.shape[2:])  # noqa: E731
    added, carry = annotate(jax.tree.map(merge, scores), jax.tree.map(merge, dict(batch)), carry)
    return dict(batch) | {name: a.reshape(count, rows, *a.shape[1:]) for name, a in added.items()}, carry


def _followed(follow: Follow, step: jax.Array, start: tree.Params, trainable: tree.Params) -> tree.Params:
    """The reference after a step: Gorbatovski et al. 2024 (arXiv:2404.09656), eq. 3."""
    now = step % follow.steps == 0
    return jax.tree.map(lambda s, p: jnp.where(now, follow.mixup * p + (1 - follow.mixup) * s, s), start, trainable)


def _chosen(fine: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)


def _mapped(objective: Objective, each: Each) -> Objective:
    """An objective whose functions of arrays are mapped over members."""

    def over(fn: Callable) -> Callable:
        return lambda config, *arrays: each(functools.partial(fn, config))(*arrays)

    annotate = None if objective.annotate is None else over(objective.annotate)
    examine = None if objective.examine is None else over(objective.examine)
    return dataclasses.replace(objective, fn=over(objective.fn), annotate=annotate, examine=examine)


def make_eval_step(objective: Objective, config: Any, score: Score, each: Each = alone) -> Callable[..., Means]:
    """Builds ``(trainable, start, frozen, batch [accumulate, rows, T], carry={}) -> sums`` of each metric and term.

    No dropout, no noise, no gradient; running quantities stay as training left them. A term ``name`` is summed as
    ``loss/name``. For ``each`` see `body`."""
    objective, asked = _mapped(objective, each), objective.asked(config)

    def step(
        trainable: tree.Params, start: tree.Params | None, frozen: Frozen, batch: Batch, carry: Carry | None = None
    ) -> Means:
        def scored(micro: Batch) -> Scores:
            found = _scores(asked, score, trainable, micro, None, start=start, frozen=frozen)
            return found | _asides(asked, score, trainable, start, frozen, micro)

        scores, carry = jax.lax.map(scored, batch), carry or {}
        if (annotate := objective.annotation(config)) is not None:
            if jax.tree.leaves(batch)[0].shape[0] == 1:
                first = lambda tree: jax.tree.map(lambda a: a[0], tree)  # noqa: E731
                added, _ = annotate(first(scores), first(dict(batch)), carry)
                batch = dict(batch) | jax.tree.map(lambda a: a[None], dict(added))
            else:
                refuse_members(each)
                batch, _ = _annotated(annotate, scores, batch, carry)

        def one(scores: Scores, micro: Batch) -> Means:
            losses, metrics = objective.fn(config, scores, micro, carry)
            if objective.examine is not None:
                metrics = metrics | objective.examine(config, scores, micro, carry)
            return {**{f"loss/{name}": mean for name, mean in losses.items()}, **metrics}

        return jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.vmap(one)(scores, dict(batch)))

    return jax.jit(step)


def _scores(
    asked: Asked,
    score: Score,
    trainable: Any,
    batch: Batch,
    key: jax.Array | None,
    *,
    start: Any,
    frozen: Frozen,
) -> dict[str, Mapping[str, jax.Array]]:
    """Scores of every view the objective asks for; only the policy and the value have a gradient, dropout and noise.

    A teacher, and the policy as the run began where it is one (the view ``start``), is scored before the policy, which
    finds in the batch what it said; only the policy's scores remain."""
    scores: dict[str, Mapping[str, jax.Array]] = {}
    base, others = frozen if isinstance(frozen, Models) else (frozen, {})
    for view in asked.views:
        with jax.named_scope(view):
            if view == "policy":
                scores[view] = score(view, terms.actor(tree.combine(trainable, base)), batch, key)
            elif view == "value":
                scores[view] = score(view, tree.combine(trainable, base)[terms.CRITIC], batch, key)
            elif view == "reference" and "ref_logp" in batch:  # scored beforehand
                scores[view] = {"logp": batch["ref_logp"]}
            else:
                known = dict(others)
                if start is not None:
                    begun = tree.combine(terms.actor(start), terms.actor(base))
                    known = dict.fromkeys(("reference", "start"), begun) | known
                if view not in known:
                    raise ValueError(
                        f"no parameters for the view {view!r}; the step has {', '.join(['policy', *known])}"
                    )
                said = jax.lax.stop_gradient(score(view, known[view], batch, None))
                if view in ("teacher", "start"):
                    batch = {**batch, "teacher": said}  # type: ignore[dict-item]
                else:
                    scores[view] = said
    return scores


def _asides(
    asked: Asked, score: Score, trainable: Any, start: Any, frozen: Frozen, batch: Batch
) -> dict[str, Mapping[str, jax.Array]]:
    """Scores of what stands beside the batch's rows, without a gradient."""
    found = {}
    for name in asked.asides:
        part = {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}
        scores = _scores(asked, score, trainable, part, None, start=start, frozen=frozen)
        found |= {f"{view}/{name}": jax.lax.stop_gradient(said) for view, said in scores.items()}
    return found


def _weights(terms_of: Callable, scored: Callable, batch: Batch, carry: Carry) -> dict[str, jax.Array]:
    """Weight of each term over the whole batch [accumulate, rows, T]; nothing is scored."""

    def one(micro: Batch) -> dict[str, jax.Array]:
        shapes = jax.eval_shape(scored, micro)
        losses, *_ = terms_of(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), micro, carry)
        return {name: mean.weight for name, mean in losses.items()}

    per_micro = jax.vmap(one)(batch)
    return {name: jnp.sum(weight, axis=0) for name, weight in per_micro.items()}


def _accumulate(loss_fn: Any, trainable: tree.Params, batch: Batch, fold: Callable) -> Any:
    """Sums gradients (float32) and the objective's sums over micro-batches, one after the other; the last carry."""
    value = jax.grad(loss_fn, has_aux=True)
    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        grads, (sums, carry) = value(trainable, jax.tree.map(lambda a: a[0], batch), fold(0))
        return grads, sums, carry

    def body(grads, indexed):
        index, micro = indexed
        more, aux = value(trainable, micro, fold(index))
        return jax.tree.map(jnp.add, grads, more), aux

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    grads, (sums, carries) = jax.lax.scan(body, zeros, (jnp.arange(count), batch))
    first = lambda a: a[0]  # noqa: E731  (the same for all: what the whole batch led to)
    return grads, jax.tree.map(lambda a: jnp.sum(a, axis=0), sums), jax.tree.map(first, carries)


def _metrics(losses: Means, means: Means, weights: dict[str, jax.Array]) -> Metrics:
    each = {name: terms.divide(mean.total, weights[name]) for name, mean in losses.items()}
    several = {f"loss/{name}": value for name, value in each.items()} if len(each) > 1 else {}
    return {"loss": sum(each.values(), jnp.float32(0)), **several, **terms.values(means)}
