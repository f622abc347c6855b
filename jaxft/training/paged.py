"""Paged optimiser state: moments that stay in the host's pinned memory and visit the device inside the step.

Dettmers et al. 2023, section 3, https://arxiv.org/abs/2305.14314, let a fault move a page. Here each array is updated
by itself, and used only once its gradient is known and the moments of an earlier array are away again, so that those of
a few arrays are on the device at once (the compiler may copy a little ahead, beside the computation). The numbers are
those of a run without it.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxft.core import tree

HOST = "pinned_host"
SMALLEST = 4096  # elements: a copy of fewer gains nothing
AHEAD = 2  # arrays between two of which the one waits for the other


def check(device: Any, setting: str) -> None:
    """Raises ValueError, naming the setting that asks for it, if the device cannot reach memory of the host."""
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise ValueError(
            f"{setting}: needs the memory {HOST} of the host; got a {device.device_kind}, which has "
            f"{', '.join(kinds)}. Leave it out; train.remat=full and optim.name=adamw_8bit save memory on every device."
        )


def places(opt_state: Any, shardings: Any) -> Any:
    """The shardings of an optimiser's state (or its shapes) with those of its large arrays moved to the host."""

    def place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
        return sharding.with_memory_kind(HOST) if leaf.size >= SMALLEST else sharding

    return jax.tree.map(place, opt_state, shardings)


def one_by_one(clip: optax.GradientTransformation, part: Callable[[tree.Params], Any]) -> Callable:
    """`Optimizer.update`, array by array; what is in the host's memory goes back there.

    ``clip``: what gradients go through together, without a state. ``part``: parameters, all but one of them ``None`` ->
    the `Optimizer` of that one, whose state is a part of that of all."""

    def update(grads: tree.Params, state: Any, params: tree.Params, step: jax.Array, fine: Any = True):
        grads = clip.update(grads, clip.init(params), params)[0]
        updates, before, after = dict[str, jax.Array](), dict(tree.arrays(state)), dict[str, jax.Array]()
        gone: list[dict[str, jax.Array]] = [{}] * AHEAD  # what each has put back
        for name, _ in tree.arrays(params):
            own = _only(params, name)
            optimizer = part(own)
            held = _filled(jax.eval_shape(optimizer.init, own), before)
            here, gradient, before_last = _fetched(held, _only(grads, name), gone[-AHEAD])
            changed, moved = optimizer.update(gradient, here, own, step, fine)
            put = dict(tree.arrays(jax.tree.map(_back, moved, held)))
            gone.append({path: a for path, a in put.items() if _on_host(a)})
            updates |= dict(tree.arrays(changed))
            after |= put | before_last
        return _filled(params, updates), _filled(state, after)

    return update


def _on_host(a: jax.Array) -> bool:
    return jax.typeof(a).memory_space == jax.memory.Space.Host


def _back(a: jax.Array, was: jax.Array) -> jax.Array:
    return jax.device_put(a, jax.memory.Space.Host) if _on_host(was) else a


def _fetched(held: Any, gradient: Any, gone: dict[str, jax.Array]) -> tuple[Any, Any, dict[str, jax.Array]]:
    """A state on the device, used there no earlier than its gradient is known and ``gone`` are away.

    These go through the barrier and are used after it: what is not used the compiler takes out of it."""
    leaves, treedef = jax.tree.flatten(held)
    away = [a for a in leaves if _on_host(a)]
    away, gradient, gone = jax.lax.optimization_barrier((away, gradient, gone))
    here = iter(jax.device_put(away, jax.memory.Space.Device))
    return treedef.unflatten([next(here) if _on_host(a) else a for a in leaves]), gradient, gone


def _only(arrays: tree.Params, name: str) -> tree.Params:
    return jax.tree_util.tree_map_with_path(lambda path, a: a if tree.join(path) == name else None, arrays)


def _filled(like: Any, arrays: dict[str, jax.Array]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[tree.join(path)], like)
