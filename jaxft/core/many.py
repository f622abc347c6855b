r"""Several adapters of one base at work on one batch, each on its own rows.

.. math:: y_r = x_r W_{m(r)}, \qquad W_m = \text{the same base, adapted by member } m

`Many` is a weight like any other, so no model code knows of it: attention, norms and the head see an ordinary batch.
``x @ base`` stays one product over all rows; only what differs between members is mapped (`jax.vmap`) beside it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxft.core import tree, verbs
from jaxft.core.tree import Params
from jaxft.core.weight import Shared, Weight, parameter, static, weight


@weight
class Many(Weight):
    """One place in the model, for ``count`` members. Rows (the first axis of ``x``) are told apart in one of two ways.

    ``ids``: int32[rows], the member of each row. Or, for ``shards`` > 0, by their order, [shards, count, rows of one]:
    a batch of every member's rows, one member after the other on each of the mesh's shards.
    """

    each: Any = parameter()
    """The weight with the arrays that differ, [*stack, count, ...], and ``None`` elsewhere."""
    common: Any = parameter()
    """The weight with all other arrays, and ``None`` where ``each`` has one."""
    ids: Shared | None = None
    count: int = static(default=0)
    shards: int = static(default=0)
    several: ClassVar[bool] = True

    @property
    def base(self) -> Any:
        return tree.combine(self.each, self.common)

    def _map(self, fn: Callable[[Any, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """``fn(weight of one member, its rows)`` over all of ``x``: [rows, ...] -> [rows, ...]."""
        each, groups, shards = self.each, self.count, self.shards
        if self.ids is not None:
            each = jax.tree.map(lambda a: a[self.ids.value], each)  # type: ignore[union-attr]
            groups, shards = self.ids.shape[0], 1
        if not shards or x.shape[0] % (groups * shards):
            told = "" if self.ids is None else f" (it is for {groups} rows)"
            raise ValueError(
                f"{self.count} adapters on {x.shape[0]} rows: which row uses which is not known{told}; say it with "
                "jaxft.for_rows(params, ids)"
            )
        rows = x.shape[0] // (groups * shards)

        def one(each: Any, x: jax.Array) -> jax.Array:
            y = fn(tree.combine(each, self.common), x.reshape(shards * rows, *x.shape[2:]))
            return y.reshape(shards, rows, *y.shape[1:])

        y = jax.vmap(one, in_axes=(0, 1), out_axes=1)(each, x.reshape(shards, groups, rows, *x.shape[1:]))
        return y.reshape(x.shape[0], *y.shape[3:])

    def __rmatmul__(self, x):
        return self._map(lambda w, x: x @ w, x)

    def take(self, ids):
        return self._map(verbs.take, ids)

    def unembed(self, x):
        return self._map(verbs.unembed, x)

    def astype(self, dtype: Any) -> "Many":
        """A norm's vector in ``dtype``, to be multiplied with or added to activations."""
        return dataclasses.replace(self, each=self.base.astype(dtype), common=None)

    def __rmul__(self, x: jax.Array) -> jax.Array:
        return self._map(lambda w, x: x * w, x)

    def __radd__(self, x: Any) -> Any:
        if jnp.ndim(x) == 0:
            return dataclasses.replace(self, each=x + self.each)
        return self._map(lambda w, x: x + w, x)

    def axes(self, names):
        raise TypeError("adapters are placed on the mesh before they are stacked: shard each, then stack_adapters")


def wrap(each: Params, common: Params, count: int, shards: int = 0) -> Params:
    """The model whose weights are `Many` where members differ, to be used like any parameters.

    ``each``: the arrays that differ, [count, ...], ``None`` elsewhere; ``common``: the rest. For ``shards`` see `Many`;
    0: rows get their ids by `for_rows`."""

    def layered(a: Any) -> Any:
        return a if isinstance(a, Shared) else jnp.moveaxis(a, 0, 1)

    def one(path: Any, e: Any, c: Any) -> Any:
        if not jax.tree.leaves(e):
            return c
        if tree.join(path).startswith("layers/"):
            e = jax.tree.map(layered, e, is_leaf=lambda a: isinstance(a, Shared))
        return Many(e, c, count=count, shards=shards)

    return jax.tree_util.tree_map_with_path(one, each, common, is_leaf=lambda w: w is None or tree.is_leaf(w))


def for_rows(params: Params, ids: Any) -> Params:
    """Stacked adapters with the member of each row of a batch: ``ids`` int[rows]; -1 is the last, which is the base
    without an adapter.

    Another choice of ids compiles nothing anew. Raises ValueError for an id that is not there (not while tracing)."""
    counts = {w.count for w in jax.tree.leaves(params, is_leaf=tree.is_weight) if isinstance(w, Many)}
    if not counts:
        raise ValueError("for_rows: the parameters hold no stacked adapters; make them with jaxft.stack_adapters")
    last = min(counts) - 1
    if not isinstance(ids, Tracer):
        rows = [i.tolist() if hasattr(i, "tolist") else i for i in ids]
        if not all(type(i) is int and -1 <= i < last for i in rows):
            numbers = f"one of 0 to {last - 1}" if last > 1 else "0"
            raise ValueError(f"adapters: got {rows}; expected for each row {numbers}, or -1 for the base")
    members = Shared(jnp.asarray(ids, jnp.int32))

    def chosen(w: Any) -> Any:
        return dataclasses.replace(w, ids=members) if isinstance(w, Many) else w

    return jax.tree.map(chosen, params, is_leaf=tree.is_leaf)
