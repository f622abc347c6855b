"""Adapters of one base brought to one structure: to be stacked, or to take each other's place uncompiled.

Unusual: ranks that differ are padded with zeros to the largest. That is sound for a weight that says by a field
``rank`` how much of it is real (padding has no gradient, never moves and is not exported), and refused for others.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import many, tree
from jaxft.core import weight as weights
from jaxft.core.tree import Params
from jaxft.core.weight import Shared, Slot, Split, Weight


def stack_adapters(adapted: Sequence[Params]) -> Params:
    """Parameters with several adapters of one base at once, for batches whose rows use different ones.

    ``adapted``: parameters of one model with adapters of one method on them (`load_adapter`), or without. Ranks and
    targets may differ. Which row uses which is said with ``adapters=`` of `Model.logprobs` and `Model.generate`, or by
    `for_rows`; -1 is the base. The base is not copied. Raises ValueError naming what does not fit."""
    if not adapted:
        raise ValueError("stack_adapters: got no adapters; expected at least one")
    slots = [name for params in adapted for name, part in params.items() if isinstance(part, Slot)]
    if slots:
        raise ValueError(f"{slots[0]}: cannot be told apart by rows; expected adapters of weights alone")
    members = align(adapted)
    each, common, _ = split([*members, off(members[0])])
    return many.wrap(each, common, len(members) + 1)


def swap(params: Params, other: Params) -> Params:
    """``other``'s adapter in the shapes of ``params``: programs compiled for these take it as it is.

    Both are on one base. A smaller rank is padded. Raises ValueError naming what does not fit."""
    same, fitted = align([params, other])
    sizes, wanted = ({path: a.shape for path, a in tree.arrays(p)} for p in (params, same))
    for path in wanted:
        if path not in sizes or wanted[path] != sizes[path]:
            more = f"a larger rank ({wanted[path]} for {sizes[path]})" if path in sizes else "more targets"
            raise ValueError(
                f"swap: {path}: the other adapter has {more} than the one it is to replace; expected at most the same. "
                "Begin with the largest: its programs serve the others too."
            )
    return fitted


def align(members: Sequence[Params], trained: Collection[str] = ()) -> list[Params]:
    """The same structure and shapes for all: ranks padded, and an adapter that does nothing where one has none.

    ``trained``: paths of the model's own arrays that may differ. What the result does not depend on (dropout, and what
    is only noted of how numbers were made) is the first one's.
    Raises ValueError naming what cannot be aligned."""
    return _align("", list(members), trained, own=True, ranked=False)


def split(members: Sequence[Params], trained: Collection[str] = ()) -> tuple[Params, Params, Params]:
    """Aligned members as (each, common, mask): arrays that differ, stacked [count, ...], and the arrays that are one
    and the same, with ``None`` where the other has the array; ``mask`` is True for the first.

    An array differs where its buffers do, and at the paths ``trained``."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(members[0])
    columns = zip(*map(jax.tree.leaves, members), strict=True)
    each, common, differs = [], [], []
    stacks: dict[tuple[int, ...], jax.Array] = {}  # what several weights share is stacked once
    for (path, _), column in zip(leaves, columns, strict=True):
        differs.append(tree.join(path) in trained or any(a is not column[0] for a in column))
        common.append(None if differs[-1] else column[0])
        same = tuple(map(id, column))
        if differs[-1] and same not in stacks:
            stacks[same] = jnp.stack(column)
        each.append(stacks[same] if differs[-1] else None)
    return structure.unflatten(each), structure.unflatten(common), structure.unflatten(differs)


def together(members: Sequence[Params], mask: Params) -> tuple[Params, Params, Params]:
    """Members to be trained side by side as (trainable, frozen, differs).

    ``mask``: what trains, the same of every member. Arrays that train, or that a member's adapter brings with it, are
    stacked, [count, ...], which ``differs`` says of each array; the base is in ``frozen`` once."""
    trained = {path for path, trains in tree.paths(mask) if trains}
    each, common, differs = split(align(members, trained), trained)
    trainable, constants = tree.partition(each, mask)
    return trainable, tree.combine(constants, common), differs


def off(params: Params) -> Params:
    """The same structure with every adapter doing nothing."""

    def one(w: Any) -> Any:
        if not isinstance(w, Weight):
            return w
        w = _rebuilt(w, {name: one(part) for name, part in _parts(w).items()})
        return w.off() if w.adapter else w

    return jax.tree.map(one, params, is_leaf=tree.is_leaf)


def _align(path: str, ws: list, trained: Collection[str], own: bool, ranked: bool) -> list:
    """`align` of what stands at one path. ``own``: it is part of the model, not of an adapter; ``ranked``: of a weight
    that knows what of it is padding."""
    kinds = {type(w) for w in ws if isinstance(w, Weight) and w.adapter}
    kind = next(iter(kinds), None)
    if len(kinds) == 1 and any(type(w) is not kind for w in ws):
        pattern = off(next(w for w in ws if type(w) is kind))
        ws = [w if type(w) is kind else dataclasses.replace(pattern, base=w) for w in ws]
    parts = [_parts(w) for w in ws]
    kinds = {type(w).__name__ if _is_node(w) or w is None else "a plain array" for w in ws}
    if len(kinds) > 1:
        raise ValueError(f"{path}: got {', '.join(sorted(kinds))}; expected adapters of one method on one model")
    if not _is_node(ws[0]):
        return _arrays(path, ws, own and path not in trained, ranked)
    for name in {name: None for p in parts for name in p}:
        if any(name not in p for p in parts):
            raise ValueError(f"{f'{path}/{name}'.strip('/')}: some members have it, some not; expected one method")
    _refuse_static(path, ws)
    is_weight = isinstance(ws[0], Weight)
    adapters = {f.name for f in dataclasses.fields(ws[0]) if weights.role(f) != weights.PARAMETER} if is_weight else ()
    ranked = hasattr(ws[0], "rank") if is_weight else ranked
    columns = {}
    for name in parts[0]:
        mine = own and name not in adapters
        columns[name] = _align(f"{path}/{name}".strip("/"), [p[name] for p in parts], trained, mine, ranked)
    return [_rebuilt(ws[0], {name: column[i] for name, column in columns.items()}) for i in range(len(ws))]


def _arrays(path: str, ws: list, own: bool, ranked: bool) -> list:
    """The arrays at one path, in the largest shape."""
    if all(a is ws[0] for a in ws):
        return ws
    if own:
        raise ValueError(
            f"{path}: the members' bases are different arrays; expected adapters of one model's parameters, whose "
            "buffers they share (a method or init that changes the base cannot be stacked)"
        )
    shapes = list({a.shape: None for a in ws})
    if len(shapes) == 1:
        return ws
    if not ranked or len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"{path}: got shapes {', '.join(map(str, shapes))}; expected one: only ranks are padded")
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return [jnp.pad(a, [(0, size - n) for size, n in zip(largest, a.shape, strict=True)]) for a in ws]


def _refuse_static(path: str, ws: list) -> None:
    """Raises ValueError if members differ in what is part of the program."""
    for field in dataclasses.fields(ws[0]) if isinstance(ws[0], Weight) else ():  # type: ignore[arg-type]
        values = dict.fromkeys(getattr(w, field.name) for w in ws) if weights.role(field) == weights.STATIC else ()
        if len(values) > 1 and field.name not in ws[0].noted:
            raise ValueError(f"{path}: got {field.name} {' and '.join(map(str, values))}; expected one for all members")


def _is_node(w: Any) -> bool:
    """Whether ``w`` is made of parts; else it is an array, or None."""
    return isinstance(w, dict | Split | Shared | Weight)


def _parts(w: Any) -> dict[str, Any]:
    """What a node of the tree is made of; an array is made of nothing."""
    if isinstance(w, dict):
        return w
    if isinstance(w, Split):
        return {str(i): part for i, part in enumerate(w.parts)}
    if isinstance(w, Shared):
        return {"value": w.value}
    if isinstance(w, Weight):
        fields = [f for f in dataclasses.fields(w) if weights.role(f) != weights.STATIC]  # type: ignore[arg-type]
        return {f.name: getattr(w, f.name) for f in fields}
    return {}


def _rebuilt(w: Any, parts: dict[str, Any]) -> Any:
    """A node like ``w`` made of other parts."""
    if isinstance(w, Weight):
        return dataclasses.replace(w, **parts)  # type: ignore[type-var]
    return parts if isinstance(w, dict) else Split(tuple(parts.values())) if isinstance(w, Split) else Shared(**parts)
