"""Measuring the inputs of the weights that a method will adapt, for initialisations that begin from data.

One backward pass a batch gives every layer's exact second moments (`core.tap`). The method says what it needs and what
it makes of the sums; how the model is run is the caller's (this room knows no model).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.core import tap, tree
from jaxft.core.names import Names
from jaxft.core.tap import Tap
from jaxft.core.weight import Shared
from jaxft.peft import places, sites
from jaxft.peft.targets import Target

Batch = Mapping[str, Any]
Forward = Callable[[tree.Params, Batch], jax.Array]


class Measured(NamedTuple):
    """What the inputs of one weight were, over all batches; float32."""

    target: Target
    gram: jax.Array
    """[*stack, in, in]: the sum of x x^T over positions."""
    total: jax.Array
    """[*stack, in]: the sum of x."""
    count: jax.Array
    """[*stack]: the number of positions; of rows, where they are scaled."""


@dataclass(frozen=True)
class Calibration:
    """What a method asks of the inputs, and what it makes of them."""

    solve: Callable[[dict[str, Measured]], dict[str, Any]]
    """`Site.statistics` by path, from what was measured."""
    loss_only: bool = False
    """Whether only positions that carry loss count, where a batch says which do; otherwise all but padding."""
    scaled: bool = False
    """Whether each row of a batch is divided by its largest entry."""


def measure(
    params: tree.Params,
    names: Names,
    config: sites.Targeted,
    need: Calibration,
    batches: Iterable[Batch],
    forward: Forward,
) -> dict[str, Measured]:
    """The inputs of every linear layer that ``config`` adapts, by path.

    ``batches`` have tokens int32[B, T] and may have segments, positions, loss_mask; ``forward(params, batch)`` is any
    function of the model's output. The sums of all layers, and a batch's, are held at once: 8 in^2 bytes a matrix.
    Raises ValueError for the head as a target, and where nothing was measured."""
    found = [t for t in sites.find(params, names, config) if t.name.kind != "embedding"]
    if any(t.name.path == places.HEAD for t in found):
        raise ValueError(
            "peft.targets: lm_head reads its inputs in chunks and cannot be measured; expected layers below the head. "
            "Leave it out of targets, or begin without data (peft.init)."
        )

    @jax.jit
    def moments(params: tree.Params, batch: Batch) -> dict[str, Any]:
        mask = Shared(counted(batch, need.loss_only))

        def value(zeros: dict[str, Any]) -> jax.Array:
            watched = params
            for t in found:
                leaf = Tap(places.get(params, t.name), *zeros[t.name.path], mask=mask, scaled=need.scaled)
                watched = places.put(watched, t.name, leaf)
            return jnp.sum(forward(watched, batch).astype(jnp.float32))

        return jax.grad(value)({t.name.path: tap.zeros(places.get(params, t.name)) for t in found})

    add = jax.jit(lambda sums, more: jax.tree.map(jnp.add, sums, more), donate_argnums=0)
    sums: dict[str, Any] = {}
    for batch in batches:
        more = moments(params, {name: jnp.asarray(value) for name, value in batch.items()})
        sums = add(sums, more) if sums else more
    if found and not (sums and all(bool(jnp.all(count > 0)) for _, _, count in sums.values())):
        raise ValueError("calibration: got no position that counts; expected batches with some (see loss_mask)")
    return {t.name.path: Measured(t, *sums[t.name.path]) for t in found}


def counted(batch: Batch, loss_only: bool) -> jax.Array:
    """bool[B, T]: the positions that count; padding, told by segments or else by positions, never does."""
    tokens = batch["tokens"]
    if loss_only and "loss_mask" in batch:
        return batch["loss_mask"].astype(bool)
    if "segments" in batch:
        return batch["segments"] > 0
    if "positions" in batch:
        last = jnp.max(batch["positions"], axis=1, keepdims=True)
        return (jnp.arange(tokens.shape[1]) <= last) & (last > 0)
    return jnp.ones(tokens.shape, bool)
