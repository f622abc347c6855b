"""Paged optimiser state: moments that stay in the host's pinned memory and visit the device inside the step.

Dettmers et al. 2023, section 3, https://arxiv.org/abs/2305.14314, let a fault move a page; here each array is copied in
and out by name, so that the compiler runs the copies beside the computation. The numbers are those of a run without it.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxft.training.state import TrainState

HOST = "pinned_host"
SMALLEST = 4096  # elements: a copy of fewer gains nothing


def check(device: jax.Device, setting: str) -> None:
    """Raises ValueError, naming the setting that asks for it, if the device cannot reach memory of the host."""
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise ValueError(
            f"{setting}: needs the memory {HOST} of the host; got a {device.device_kind}, which has "
            f"{', '.join(kinds)}. Leave it out; train.remat=full and optim.name=adamw_8bit save memory on every device."
        )


def places(state: TrainState, shardings: TrainState) -> TrainState:
    """The shardings of a state with those of large arrays of the optimiser moved to the host; ``state``: its shapes."""

    def place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
        return sharding.with_memory_kind(HOST) if leaf.size >= SMALLEST else sharding

    return shardings._replace(opt_state=jax.tree.map(place, state.opt_state, shardings.opt_state))


def visiting(step: Callable, places: Any) -> Callable:
    """``step(state, frozen, batch) -> (state, metrics)`` on a state that is where ``places`` says."""
    if not isinstance(places, TrainState):
        return step
    held = places.opt_state

    def move(arrays: Any, kind: str) -> Any:
        def one(a: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
            return jax.device_put(a, place.with_memory_kind(kind)) if place.memory_kind == HOST else a

        return jax.tree.map(one, arrays, held)

    def visited(state: TrainState, *rest: Any) -> tuple[TrainState, Any]:
        state, metrics = step(state._replace(opt_state=move(state.opt_state, "device")), *rest)
        return state._replace(opt_state=move(state.opt_state, HOST)), metrics

    return visited
