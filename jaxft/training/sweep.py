"""Many runs as one: members that share the frozen base, the data and the program, and nothing that trains.

A sweep's state is its members' states stacked on a leading axis, and its step is the step of one run mapped over that
axis (`jax.vmap`): each member has its own schedule, clipping, moments, dropout and skipped steps, and each layer's
matrix of each member is what Muon and Adafactor see. Only the score is of all members at once (`rollout.members`), so
that the base is read once. What a member does is what it would do alone, up to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import hooks as hooks_
from jaxft.core import tree
from jaxft.core.hooks import Hooks
from jaxft.objectives.terms import Batch, Means, Objective
from jaxft.training import optim
from jaxft.training import step as step_
from jaxft.training.config import OptimConfig
from jaxft.training.optim import Optimizer
from jaxft.training.prefetch import Loader
from jaxft.training.state import TrainState
from jaxft.training.step import Score, Shardings, Step


def make_optimizer(
    config: OptimConfig,
    trainable: tree.Params,
    peaks: Sequence[float],
    total_steps: int,
    factors: tree.Params | None = None,
) -> Optimizer:
    """`optim.make` for members with peak rates ``peaks``; ``trainable``: arrays, or shapes, of one member."""

    def one(peak: Any) -> Optimizer:
        return optim.make(config, trainable, total_steps, factors=factors, peak_lr=peak)

    rates = jnp.asarray(peaks, jnp.float32)
    any_one = one(peaks[0])

    def update(*arrays: Any) -> Any:
        return jax.vmap(lambda rate, *arrays: one(rate).update(*arrays))(rates, *arrays)

    def learning_rate(now: jax.Array) -> jax.Array:
        return jax.vmap(lambda rate, now: one(rate).learning_rate(now))(rates, now)

    penalty = None if any_one.penalty is None else jax.vmap(any_one.penalty)
    return Optimizer(jax.vmap(any_one.init), update, learning_rate, jax.vmap(any_one.averaged), penalty)


def make_step(
    objective: Objective,
    config: Any,
    score: Score,
    optimizer: Optimizer,
    members: int,
    own_order: bool = False,
    shardings: Shardings | None = None,
    hooks: Hooks = hooks_.NONE,
) -> Step:
    """`step.make_step` of all members: states and metrics are [members, ...], but for ``tokens``, the sum.

    ``batch``: [accumulate, rows, T], the same rows for all, or with ``own_order`` [accumulate, rows x members, T]."""
    hooks = Hooks(jax.vmap(hooks.start), jax.vmap(hooks.gradients), jax.vmap(hooks.update))
    body = step_.body(objective, config, score, optimizer, jax.vmap, hooks)

    def step(state: TrainState, frozen: tree.Params, batch: Batch) -> tuple[TrainState, step_.Metrics]:
        return body(state, frozen, spread(batch, members, own_order))

    return step_.compiled(step, shardings)


def make_eval_step(objective: Objective, config: Any, score: Score, members: int) -> Callable[..., Means]:
    """`step.make_eval_step` of all members, on the same rows: sums are [members]."""
    made = step_.make_eval_step(objective, config, score, jax.vmap)
    return jax.jit(
        lambda trainable, start, frozen, batch, carry=None: made(
            trainable, start, frozen, spread(batch, members), carry
        )
    )


def spread(batch: Batch, members: int, own_order: bool = False) -> Batch:
    """[accumulate, rows, T] -> [accumulate, members, rows, T]."""

    def one(a: jax.Array) -> jax.Array:
        if own_order:
            return jnp.moveaxis(a.reshape(a.shape[0], -1, members, *a.shape[2:]), 2, 1)
        return jnp.broadcast_to(a[:, None], (a.shape[0], members, *a.shape[1:]))

    return jax.tree.map(one, dict(batch))


def member(stacked: Any, index: int) -> Any:
    """One member's part of a tree of arrays [members, ...]."""
    return jax.tree.map(lambda a: a[index], stacked)


class Orders:
    """Batches of members that each go through the data in an order of their own: row by row, a row of every member."""

    def __init__(self, loaders: Sequence[Loader]):
        self.loaders = loaders

    def __next__(self) -> dict[str, np.ndarray]:
        batches = [next(loader) for loader in self.loaders]
        return {
            name: np.stack([b[name] for b in batches], 1).reshape(-1, *a.shape[1:]) for name, a in batches[0].items()
        }

    def state(self) -> Any:
        """Every member's cursor."""
        cursors = [loader.state() for loader in self.loaders]
        return {"consumed": cursors[0]["consumed"], "members": cursors}

    def restore(self, state: Any) -> None:
        for loader, cursor in zip(self.loaders, state["members"], strict=True):
            loader.restore(cursor)
