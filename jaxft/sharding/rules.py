"""From paths to logical axes, from logical axes to mesh axes.

One table names the axes of every weight of the decoder; one maps those names to the mesh. A wrapped weight asks its
class how its fields lie along the dense weight's axes, so an adapter is sharded like the matrix it adapts. An axis that
does not divide is left whole.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.core import tree
from jaxft.core.many import Many
from jaxft.core.weight import STATIC, Split, Weight, is_packed, role

Axes = tuple[str | None, ...]

LOGICAL: tuple[tuple[str, Axes], ...] = (
    (r"^embed/tokens$", ("vocab", "embed")),
    (r"^embed/positions$", (None, "embed")),
    (r"^head$", ("embed", "vocab")),
    (r"^score$", ("embed", None)),
    (r"^layers/attn/(q|k|v|qkv)$", ("layers", "embed", "heads")),
    (r"^layers/attn/o$", ("layers", "heads", "embed")),
    (r"^layers/mlp/(gate|up|gate_up)$", ("layers", "embed", "mlp")),
    (r"^layers/mlp/down$", ("layers", "mlp", "embed")),
    (r"^layers/(adapter|parallel_adapter)$", ("layers", "embed", "embed")),
    (r"norm/(scale|bias)$", ()),
    (r"^(prompt|prefix|distil/.*)$", ()),
)
"""Logical axes of the dense weight at each path; vectors of a norm are replicated."""

RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Mesh axis of each logical axis."""


def logical(path: str) -> Axes:
    """Logical axes of the weight at ``path``; a value model's are those of the same weight of the policy. Raises
    ValueError for a path that no row of `LOGICAL` matches."""
    path = path.removeprefix("critic/")
    for pattern, axes in LOGICAL:
        if re.search(pattern, path):
            return axes
    raise ValueError(f"no sharding rule for the weight '{path}'; add a row to LOGICAL in {__name__}")


def spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> PartitionSpec:
    """Mesh axes for an array. Raises ValueError if two of its axes would use the same mesh axis."""
    wanted = [rules[name] if name is not None else None for name in axes]
    for axis in wanted:
        if axis is not None and wanted.count(axis) > 1:
            raise ValueError(f"sharding rules put two axes of {axes} on the mesh axis '{axis}'")
    divides = [axis is not None and size % mesh.shape[axis] == 0 for axis, size in zip(wanted, shape, strict=False)]
    return PartitionSpec(*(axis if fits else None for axis, fits in zip(wanted, divides, strict=False)))


def shardings(params: tree.Params, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> tree.Params:
    """A tree of NamedSharding like ``params`` (arrays or shapes)."""

    return tree.map_weights(lambda path, w: of(path, w, mesh, rules), params)


def of(path: str, w: Any, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """The weight at ``path`` with a NamedSharding in the place of each array."""
    return _of(w, logical(path), mesh, rules)


def _of(w: Any, axes: Axes, mesh: Mesh, rules: Mapping[str, str | None]) -> Any:
    if isinstance(w, Split):
        return Split(tuple(None if part is None else _of(part, axes[1:], mesh, rules) for part in w.parts))
    if not isinstance(w, Weight):
        if isinstance(w, dict):
            return {name: NamedSharding(mesh, PartitionSpec()) for name in w}
        return NamedSharding(mesh, spec(axes, w.shape, mesh, rules))
    fields = w.axes(axes)
    changed = {}
    for f in dataclasses.fields(w):  # type: ignore[arg-type]
        value = getattr(w, f.name)
        if role(f) != STATIC and value is not None:
            changed[f.name] = jax.tree.map(
                lambda v, a=fields[f.name]: _of(v, a, mesh, rules), value, is_leaf=tree.is_leaf
            )
    return dataclasses.replace(w, **changed)  # type: ignore[type-var]


def gather(mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Callable[[tree.Params], tree.Params] | None:
    """The function that gathers the packed bytes of one layer's weights over fsdp; None where nothing is apart.

    Left to the compiler, it is the dense matrix that each device sends, in four times the bytes. Shards over other
    mesh axes stay, and so do arrays that are not packed. What is gathered is named "gathered"."""
    if mesh.shape["fsdp"] == 1:
        return None
    whole = {name: None if axis == "fsdp" else axis for name, axis in rules.items()}
    return functools.partial(_gathered, mesh=mesh, rules=whole)


def _gathered(layer: tree.Params, mesh: Mesh, rules: Mapping[str, str | None]) -> tree.Params:
    def whole(a: jax.Array, place: NamedSharding) -> jax.Array:
        return checkpoint_name(jax.lax.with_sharding_constraint(a, place), "gathered")

    def bytes_of(w: Any, axes: Axes) -> Any:
        if w.packed:
            return jax.tree.map(whole, w, _of(w, axes, mesh, rules))
        fields = {"common": axes} if isinstance(w, Many) else w.axes(axes)
        inside = {name: getattr(w, name) for name in fields}
        changed = {n: bytes_of(value, fields[n]) for n, value in inside.items() if isinstance(value, Weight)}
        return dataclasses.replace(w, **changed)

    def one(path: str, w: Any) -> Any:
        packs = any(map(is_packed, jax.tree.leaves(w, is_leaf=is_packed)))
        return bytes_of(w, logical(f"layers/{path}")[1:]) if packs else w

    return tree.map_weights(one, layer)
