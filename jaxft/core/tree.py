"""Functions on parameter trees: select, wrap, strip, merge, mask, partition, combine, count.

Trainability is data, not type: a mask tree of booleans splits a tree into two with ``None`` holes; only the trainable
one is differentiated, optimised and saved, and `combine` rebuilds the whole inside the jitted loss. A selection that
matches nothing is an error, never a fallback.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxft.core import weight as weights
from jaxft.core.indexed import Indexed
from jaxft.core.weight import Head, Shared, Slot, Split, Transposed, Weight, is_packed

Params = Any  # nested dicts of arrays and Weights

PRESETS = {
    "full": r"",
    "bitfit": r"(^|/)bias$",
    "norms": r"norm(/|$)",
    "embeddings": r"^(embed|head)(/|$)",
}


def is_weight(x: Any) -> bool:
    """Whether ``x`` is a Weight: the leaf test of functions that do not look inside one."""
    return isinstance(x, Weight)


def is_split(x: Any) -> bool:
    """Whether ``x`` is one stack held as separate layers."""
    return isinstance(x, Split)


def _is_stack(x: Any) -> bool:
    """Whether ``x`` is to be indexed as a whole: a split stack, or what its layers share or look up."""
    return isinstance(x, Split | Shared | Indexed)


def is_leaf(x: Any) -> bool:
    """Whether ``x`` is what a user calls one weight: a Weight or a split stack (plain arrays are leaves anyway)."""
    return is_weight(x) or is_split(x)


def join(path: Sequence[Any]) -> str:
    """A JAX key path as text: ``layers/attn/q``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def paths(tree: Params, inside: bool = True) -> list[tuple[str, Any]]:
    """All leaves with their paths; ``inside=False`` stops at Weights instead of listing their arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_split if inside else is_leaf)
    return [(join(p), leaf) for p, leaf in leaves if not is_split(leaf) or jax.tree.leaves(leaf)]


def arrays(tree: Params) -> list[tuple[str, jax.Array]]:
    """All arrays with their paths, those of a split stack one by one; ``None`` holes left out."""
    return [(join(p), leaf) for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def map_weights(fn: Callable[[str, Any], Any], params: Params) -> Params:
    """``fn(path, weight)`` over every plain array and every Weight, without descending into Weights."""
    return jax.tree_util.tree_map_with_path(lambda p, w: fn(join(p), w), params, is_leaf=is_leaf)


def select(params: Params, pattern: str) -> list[str]:
    """Paths (Weights not descended into) that ``pattern``, a regex searched for, matches.

    Raises ValueError naming some paths if there are none."""
    found = [p for p, _ in paths(params, inside=False) if re.search(pattern, p)]
    if not found:
        raise ValueError(_nothing("pattern", pattern, [p for p, _ in paths(params, inside=False)]))
    return found


def get(params: Params, path: str) -> Any:
    """The subtree at ``path`` (dict keys only)."""
    for part in path.split("/"):
        if not isinstance(params, dict) or part not in params:
            raise KeyError(f"no '{part}' on the way to '{path}'")
        params = params[part]
    return params


def replace(params: Params, path: str, value: Any) -> Params:
    """A copy of the tree with the subtree at ``path`` replaced; nothing else is copied."""
    head, _, rest = path.partition("/")
    return {**params, head: replace(params[head], rest, value) if rest else value}


def wrap(params: Params, path: str, fn: Callable[[Any], Any]) -> Params:
    """Replaces the weight at ``path`` by ``fn(weight)``; a map on the matrix goes inside an Affine or an Untied."""

    def inside(w: Any) -> Any:
        inner = isinstance(w, weights.Affine | weights.Untied)
        return dataclasses.replace(w, base=inside(w.base)) if inner else fn(w)

    return replace(params, path, inside(get(params, path)))


def _rebuild(w: Weight, fn: Callable[[dataclasses.Field, Any], Any]) -> Any:
    """The Weight with ``fn(field, value)`` applied to each field that is not static."""
    fields = [f for f in dataclasses.fields(w) if weights.role(f) != weights.STATIC]  # type: ignore[arg-type]
    return dataclasses.replace(w, **{f.name: fn(f, getattr(w, f.name)) for f in fields})  # type: ignore[type-var]


def adapters(params: Params) -> list[Weight]:
    """Every adapter in the tree, each before those inside it."""
    found: list[Weight] = []

    def look(w: Any) -> Any:
        if isinstance(w, Weight):
            found.extend([w] if w.adapter else [])
            _rebuild(w, lambda f, v: jax.tree.map(look, v, is_leaf=is_weight))
        return w

    jax.tree.map(look, params, is_leaf=is_weight)
    return found


def strip(params: Params) -> Params:
    """The model without its adapters: the same base buffers, the wrappers gone."""

    def bare(w: Any) -> Any:
        if not isinstance(w, Weight):
            return w
        if w.adapter:
            return bare(w.base)
        w = _rebuild(w, lambda f, v: bare(v))
        if isinstance(w, Head) and isinstance(w.base, Transposed):
            return w.base.base
        return w.base if isinstance(w, weights.Untied) and w.head is w.base else w

    def without_slots(part: Params) -> Params:
        if not isinstance(part, dict):
            return part
        return {name: without_slots(p) for name, p in part.items() if not isinstance(p, Slot)}

    return jax.tree.map(bare, without_slots(params), is_leaf=is_weight)


def merge(params: Params) -> Params:
    """The model with every adapter folded into a plain weight, layers stacked.

    Raises NotMergeable naming the path, and ValueError (not while tracing) where a merged weight is not finite."""

    def fold(path: str, w: Any) -> Any:
        if not isinstance(w, Weight):
            return w
        w = w.followed() if isinstance(w, weights.Untied) else w
        w = _rebuild(w, lambda f, v: fold(f"{path}/{f.name}", v))
        if isinstance(w, Head) and not isinstance(w.base, Weight):
            return jnp.swapaxes(w.base, -1, -2)
        if not w.adapter and isinstance(w, weights.Affine) and isinstance(w.base, weights.Affine):
            # an adapter inside had a constant
            return weights.Affine(w.base.base, w.bias + w.base.bias)
        try:
            return _finite(path, w.merged()) if w.adapter else w
        except weights.NotMergeable as error:
            raise weights.NotMergeable(f"{path}: {error}") from None

    return map_weights(fold, stack_layers(params))


def _finite(path: str, merged: Any) -> Any:
    for where, a in paths(merged):
        if isinstance(a, Tracer):
            continue
        with jax.ensure_compile_time_eval():  # a constant of a program that is being traced
            finite = bool(jnp.all(jnp.isfinite(a)))
        if not finite:
            raise ValueError(
                f"{'/'.join(filter(None, (path, where)))}: merging gives numbers that are not finite, so the base is "
                "left as it is; expected a finite adapter. Go back to a checkpoint from before training diverged."
            )
    return merged


def trainable_mask(params: Params, select: str | None = None) -> Params:
    """A tree of booleans: True for what trains.

    Fields that a Weight declares `trainable` always do; ``select`` (a regex searched in paths, or a preset: full,
    bitfit, norms, embeddings) adds plain arrays, bases and biases of floating dtype. Raises ValueError if nothing
    is left to train, or if ``select`` matches nothing.
    """
    pattern = None if select is None else re.compile(PRESETS.get(select, select))
    matched = False

    def plain(path: str, leaf: Any) -> bool:
        nonlocal matched
        hit = pattern is not None and bool(pattern.search(path)) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        matched |= hit
        return jax.tree.map(lambda _: hit, leaf)  # one boolean, or one for each part of a Split

    def visit(path: str, w: Any) -> Any:
        if not isinstance(w, Weight):
            return plain(path, w)

        def field(f: dataclasses.Field, value: Any) -> Any:
            where = f"{path}/{f.name}"
            if value is None:
                return None
            if weights.role(f) == weights.TRAINABLE:
                return jax.tree.map(lambda _: True, value)
            if weights.role(f) == weights.PARAMETER:
                return visit(where, value)
            return jax.tree.map(lambda _: False, value)

        return _rebuild(w, field)

    mask = map_weights(visit, params)
    everything = [p for p, _ in paths(params)]
    if select is not None and not matched:
        raise ValueError(_nothing("select", select, everything))
    if not any(jax.tree.leaves(mask)):
        raise ValueError(_nothing("select", select, everything))
    return mask


def _nothing(what: str, pattern: str | None, known: list[str]) -> str:
    if pattern is None:
        return (
            "nothing to train: the parameters hold no adapter and no pattern was given. Adapt them first "
            "(jaxft.peft.adapt) or pass select=, for example 'full' or 'norms'."
        )
    some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"{what}={pattern!r} matches no weight of floating dtype. Presets: {', '.join(PRESETS)}; paths: {some}"


def partition(params: Params, mask: Params) -> tuple[Params, Params]:
    """Splits by a boolean tree into (trainable, frozen), each with ``None`` where the other has the array."""
    trainable = jax.tree.map(lambda m, p: p if m else None, mask, params)
    frozen = jax.tree.map(lambda m, p: None if m else p, mask, params)
    return trainable, frozen


def combine(trainable: Params, frozen: Params) -> Params:
    """Puts two trees with complementary ``None`` holes together again."""
    return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None)


def count(tree: Params) -> int:
    """Number of parameters: elements of the model's and the adapters' floating arrays.

    ``None`` holes count nothing, nor do a Weight's frozen constants (scales, ranks, keys)."""
    kinds = (weights.PARAMETER, weights.TRAINABLE)

    def elements(w: Any) -> int:
        if isinstance(w, Weight):
            if w.packed:
                return math.prod(w.shape) if jax.tree.leaves(w.codes) else 0  # type: ignore[attr-defined]
            fields = dataclasses.fields(w)  # type: ignore[arg-type]
            return sum(count(getattr(w, f.name)) for f in fields if weights.role(f) in kinds)
        return math.prod(w.shape) if jnp.issubdtype(w.dtype, jnp.inexact) else 0

    return sum(elements(w) for w in jax.tree.leaves(tree, is_leaf=is_weight))


def cast(params: Params, dtype: Any) -> Params:
    """Floating arrays of the model itself (plain, bases, biases) in ``dtype``; adapters cast themselves at use, and
    packed weights stay what they are, values and all."""

    def one(w: Any) -> Any:
        if isinstance(w, Weight):
            return _rebuild(w, lambda f, v: one(v) if weights.role(f) == weights.PARAMETER else v)
        if w is None or not jnp.issubdtype(w.dtype, jnp.inexact):
            return w
        return jax.tree.map(lambda a: a.astype(dtype), w)

    return jax.tree.map(one, params, is_leaf=is_leaf)


def dropout_keys(params: Params, key: jax.Array | None) -> Params:
    """Sets the ``key`` field of every Weight that has one (and a ``rate`` above 0): a key for each path and layer.

    ``None`` means evaluation: dropout is off."""

    def set_key(path: str, w: Any) -> Any:
        if not isinstance(w, Weight):
            return w

        def field(f: dataclasses.Field, value: Any) -> Any:
            if f.name != "key":
                return set_key(f"{path}/{f.name}", value)
            if key is None or w.rate == 0.0:  # type: ignore[attr-defined]
                return None
            mine = jax.random.fold_in(key, zlib.crc32(path.encode()))
            stack = w.shape[:-2]
            return jax.random.split(mine, stack) if stack else mine

        return _rebuild(w, field)

    return map_weights(set_key, params)


def split_layers(
    tree: Params, key: str = "layers", donate: bool = False, known: dict[int, tuple[Any, Split]] | None = None
) -> Params:
    """Holds each stack of matrices under ``key`` as separate per-layer arrays (`Split`): for unrolled layers.

    Vectors and constants stay stacked: a slice of them costs nothing. Not so those of packed weights, which kernels
    read.

    ``donate`` frees each stack once it is split, so that never more than one of them exists twice. ``known`` notes by
    identity what was split: trees that share stacks, split one after the other with the same, share the parts."""
    known = {} if known is None else known

    def split(a: Any, least: int = 3) -> Any:
        if is_packed(a):
            return jax.tree.map(lambda part: split(part, 1), a, is_leaf=_is_stack)
        if _is_stack(a) or a.ndim < least:
            return a
        if id(a) in known:
            return known[id(a)][1]
        parts = Split(tuple(a[i] for i in range(a.shape[0])))
        known[id(a)] = a, parts  # held, so that its id stays its own
        if donate:
            jax.block_until_ready(parts.parts)
            a.delete()
        return parts

    return {**tree, key: jax.tree.map(split, tree[key], is_leaf=lambda a: _is_stack(a) or is_packed(a))}


def stack_layers(tree: Params) -> Params:
    """The inverse of `split_layers`: every `Split` that is whole as one stacked array."""
    return jax.tree.map(lambda w: jnp.stack(w.parts) if is_split(w) and w.whole else w, tree, is_leaf=is_split)


def num_layers(params: Params) -> int:
    """Depth of the stack under ``layers``."""
    leaves = jax.tree.leaves(params["layers"], is_leaf=_is_stack)
    return next(a for a in leaves if not isinstance(a, Shared)).shape[0]


def layer(tree: Params, index: Any) -> Params:
    """Layer ``index`` of a tree of stacked arrays (or `Split`s)."""
    return jax.tree.map(lambda a: a[index], tree, is_leaf=_is_stack)


def hold_shared(stack: Params) -> tuple[list, Callable[[list], Params]]:
    """What a scan over layers may slice (the arrays of ``stack``, those that are `Shared` or looked up left out as
    ``None``), and the function that makes a layer of a slice."""
    held = lambda a: isinstance(a, Shared | Indexed)  # noqa: E731
    leaves, treedef = jax.tree.flatten(stack, is_leaf=held)
    sliced = [None if held(a) else a for a in leaves]

    def whole(part: list) -> Params:
        return treedef.unflatten([a if p is None else p for p, a in zip(part, leaves, strict=True)])

    return sliced, whole
