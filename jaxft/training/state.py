"""The training state: everything that changes from step to step, and nothing else.

The frozen base travels beside it and is never donated or saved. Trainable arrays are float32 whatever the base's dtype:
a bfloat16 parameter cannot hold updates a thousand times smaller than itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.objectives import terms
from jaxft.training.optim import Optimizer


class TrainState(NamedTuple):
    """The state of a run after ``step`` steps."""

    step: jax.Array
    """int32[]: steps taken, skipped ones included."""
    trainable: tree.Params
    """float32 arrays with ``None`` where the base is frozen."""
    start: tree.Params | None
    """``trainable`` as the stage began, without a value model: the reference policy, and where penalties pull to. None
    where nothing asks."""
    opt_state: Any
    carry: Mapping[str, jax.Array]
    """Running quantities of the objective."""
    method_state: Any
    """State of a fine-tuning method that changes itself during training; None for most."""
    key: jax.Array
    """The run's PRNG key. Constant: each step folds its number into it."""
    fisher: tree.Params | None = None
    """What elastic weight consolidation weighs each trainable number by; None without it."""


def create(
    trainable: tree.Params,
    optimizer: Optimizer,
    key: jax.Array,
    reference: bool = False,
    carry: Mapping[str, jax.Array] | None = None,
    method_state: Any = None,
    shardings: TrainState | None = None,
    fisher: tree.Params | None = None,
) -> TrainState:
    """The state before the first step. Buffers are its own: donating it leaves the arguments alone.

    Args:
      trainable: floating arrays and ``None`` holes; cast to float32.
      key: one, or [members]: the states of several runs, stacked (`sweep`).
      reference: keep a copy of the start, for an objective with a ``reference`` view; penalties keep one anyway.
      carry: the objective's running quantities before the first step, scalars.
      shardings: a state of shardings (see `shardings`), or None for the default device.
      fisher: from `fisher.estimate`.
    """
    bad = [path for path, leaf in tree.paths(trainable) if not jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if bad:
        raise ValueError(f"cannot train integer arrays: {', '.join(bad[:8])}; expected floating dtypes")

    def init(trainable, key, carry, method_state, fisher):
        carry = {name: jnp.broadcast_to(value, key.shape) for name, value in carry.items()}
        values = jax.tree.map(lambda a: a.astype(jnp.float32), trainable)
        start = terms.actor(values) if reference or optimizer.penalty is not None else None
        return TrainState(
            jnp.zeros(key.shape, jnp.int32), values, start, optimizer.init(values), carry, method_state, key, fisher
        )

    carry = {name: jnp.float32(value) for name, value in (carry or {}).items()}
    return jax.jit(init, out_shardings=shardings)(trainable, key, carry, method_state, fisher)


def steps_taken(state: TrainState) -> int:
    """The number of steps behind a state; the same for all members of a sweep."""
    return int(np.max(jax.device_get(state.step)))


def abstract(
    trainable: tree.Params,
    optimizer: Optimizer,
    key: jax.Array,
    reference: bool = False,
    carry: Mapping[str, jax.Array] | None = None,
    method_state: Any = None,
    fisher: tree.Params | None = None,
) -> TrainState:
    """Shapes and dtypes of `create`'s result, without making it. The arguments may hold shapes."""
    return jax.eval_shape(
        lambda t, k, m, f: create(t, optimizer, k, reference, carry, m, fisher=f), trainable, key, method_state, fisher
    )


def shardings(state: TrainState, trainable: tree.Params, other: jax.sharding.Sharding) -> TrainState:
    """Shardings of a whole state from those of its trainable arrays.

    Args:
      state: a state, or the shapes of one.
      trainable: the tree of shardings of ``state.trainable``.
      other: the sharding of all else (counters, keys, factored moments): usually replicated.

    An array of the state that repeats a trainable one (its moment, its average, its start: same path, same shape) is
    sharded like it.
    """
    places = dict(tree.paths(trainable))
    known = {path: (leaf.shape, places[path]) for path, leaf in tree.paths(state.trainable)}

    def place(path: Any, leaf: jax.Array) -> jax.sharding.Sharding:
        parts = tree.join(path).split("/")
        for i in range(len(parts)):
            for j in range(i + 1, len(parts) + 1):
                shape, sharding = known.get("/".join(parts[i:j]), (None, other))
                if shape == leaf.shape:
                    return sharding
        return other

    return jax.tree_util.tree_map_with_path(place, state)
