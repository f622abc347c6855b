"""An optimiser for stacked layers: each layer's array is transformed as if it were alone.

Layers are stacked on a leading axis, ``[L, in, out]``. Adam and Lion are elementwise and do not notice; Adafactor's
factored moments and update clipping and Muon's orthogonalisation would mix layers or refuse the shape. `per_leaf` runs
one transformation for each leaf, mapped (`jax.vmap`) over the leaf's stack, so the update of a stacked layer equals the
update of that layer alone by construction, for any transformation.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxft.core import tree

Stacked = Callable[[str], int]
"""Path of an array -> how many leading axes count layers (or experts): 0 for an array that stands alone."""


def stacked(path: str) -> int:
    """The default rule: arrays under ``layers/`` are stacked on axis 0, unless held one by one (a numeric part)."""
    return int(path.startswith("layers/") and not re.search(r"/\d+(/|$)", path))


def per_leaf(choose: Callable[[str, int], optax.GradientTransformation], rule: Stacked) -> optax.GradientTransformation:
    """Runs ``choose(path, ndim of one layer)`` on each leaf by itself.

    The state is the parameters' tree with each leaf replaced by that leaf's own state."""

    def of(path: Any, leaf: jax.Array) -> optax.GradientTransformation:
        where = tree.join(path)
        depth = rule(where)
        return _mapped(choose(where, leaf.ndim - depth), depth)

    def init(params: tree.Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, p: of(path, p).init(p), params)

    def update(updates: tree.Params, state: Any, params: tree.Params | None = None) -> tuple[tree.Params, Any]:
        if params is None:
            raise ValueError("per_leaf needs the parameters: call update(grads, state, params)")
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        states, values = treedef.flatten_up_to(state), treedef.flatten_up_to(params)
        done = [of(path, u).update(u, s, p) for (path, u), s, p in zip(leaves, states, values, strict=True)]
        return treedef.unflatten([u for u, _ in done]), treedef.unflatten([s for _, s in done])

    return optax.GradientTransformation(init, update)


def _mapped(transform: optax.GradientTransformation, depth: int) -> optax.GradientTransformation:
    init, update = transform.init, transform.update
    for _ in range(depth):
        init, update = jax.vmap(init), jax.vmap(update)
    return optax.GradientTransformation(init, update)
