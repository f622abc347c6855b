"""A parameter followed through a traced function, from where it is stored to where it is used."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jaxft.flax.kernel import Kernel, Layout

Axis = tuple[tuple[int, ...], tuple[int, ...]]  # the parameter's own axes behind this one; which part of a split
STATIC = {"static": True}


@dataclass(eq=False)
class Seen:
    """What a model does with its parameters, by path."""

    uses: dict[str, set[tuple[str, Layout]]] = field(default_factory=dict)
    biases: dict[str, set[str]] = field(default_factory=dict)
    """Of a parameter in products: the parameters added to them."""
    unbiased: set[str] = field(default_factory=set)
    """Parameters of which a product goes into something else than such a sum."""
    elsewhere: dict[str, str] = field(default_factory=dict)
    """The first operation that used the parameter otherwise."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """A parameter on its way to where it is used: the array as it now is, or the `Kernel` that stands for it."""

    value: Any
    path: str = field(metadata=STATIC)
    axes: tuple[Axis, ...] | None = field(metadata=STATIC)
    """Of the array as it now is; None once they no longer make a matrix."""
    walked: tuple[int, ...] = field(default=(), metadata=STATIC)
    """Own axes that scans have sliced."""
    seen: Seen | None = field(default=None, metadata=STATIC)

    @property
    def adapted(self) -> bool:
        return isinstance(self.value, Kernel)


@dataclass(frozen=True)
class Product:
    """A product to which its bias may be about to be added."""

    of: Held
    finish: Callable[[jax.Array | None], jax.Array]
    """The product with this bias, [*batch, out]."""
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    """Of the product: the batch and output axes, in the order of the bias."""


def held(path: str, value: Any, seen: Seen | None = None) -> Held:
    """A parameter before any use."""
    return Held(value, path, tuple(((a,), ()) for a in range(-value.ndim, 0)), seen=seen)


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of an equation of a jaxpr."""
    with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack)):
        outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


def plain(value: Any, user: str) -> Any:
    """The array, for an operation ``user`` that does not follow parameters.

    Raises TypeError for an adapted one, and for a product whose bias was to be added before the map on it."""
    if isinstance(value, Product) and value.of.adapted:
        raise TypeError(
            f"{value.of.path} is adapted by a map on its output, {value.of.value.bias} included, and here the product "
            f"goes into {user!r} first. Leave it out of targets, or choose a method that maps the weight."
        )
    if isinstance(value, Product):
        if value.of.seen is not None:
            value.of.seen.unbiased.add(value.of.path)
        return value.finish(None)
    if not isinstance(value, Held):
        return value
    if value.adapted:
        raise TypeError(
            f"{value.path} is adapted and here it goes into {user!r}; expected a {value.value.use} like the one it was "
            "adapted for. Leave it out of targets, or give this call as the example when adapting."
        )
    if value.seen is not None:
        value.seen.elsewhere.setdefault(value.path, user)
    return value.value


def layout_of(h: Held, batch: list[int], rows: list[int], columns: list[int]) -> Layout | None:
    """The matrix that axes of the array make in a product; None if they make none."""
    if h.axes is None or any(h.axes[d][1] for d in batch):
        return None
    own = [sorted({a for d in dims for a in h.axes[d][0]}) for dims in (batch, rows, columns)]
    stack = (*h.walked, *own[0])
    if not own[1] or not own[2] or {*own[1]} & {*own[2]} or stack != tuple(sorted(stack)):
        return None
    return Layout(stack, tuple(own[1]), tuple(own[2]))


def regroup(axes: tuple[Axis, ...], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Axis, ...] | None:
    """Axes after a reshape that splits one, joins whole neighbours, or puts in axes of size 1; None for any other."""
    if math.prod(old) != math.prod(new) or any(n == 1 and own for n, (own, _) in zip(old, axes, strict=True)):
        return None
    result: list[Axis] = [((), ())] * len(new)
    left = [d for d, n in enumerate(old) if n > 1]
    right = [d for d, n in enumerate(new) if n > 1]
    while left:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        while (a := math.prod(old[d] for d in ours)) != (b := math.prod(new[d] for d in theirs)):
            ours, theirs = (ours, [*theirs, right.pop(0)]) if a > b else ([*ours, left.pop(0)], theirs)
        own = tuple(o for d in ours for o in axes[d][0])
        if len(ours) > 1 and (len(theirs) > 1 or any(axes[d][1] for d in ours) or own != tuple(sorted(own))):
            return None
        part = axes[ours[0]][1] if len(ours) == 1 else ()
        for i, d in enumerate(theirs):
            result[d] = (own, part if len(theirs) == 1 else (*part, i))
    return tuple(result)


def sliced(h: Any) -> Any:
    """A parameter whose first axis a scan has taken."""
    if not isinstance(h, Held):
        return h
    if h.axes is None or len(h.axes[0][0]) != 1 or h.axes[0][1]:
        return replace(h, axes=None)
    return replace(h, axes=h.axes[1:], walked=(*h.walked, *h.axes[0][0]))
