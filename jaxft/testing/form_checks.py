"""What is looked at before all else: that `wrap` gives a Weight, its fields, their roles and their shapes.

Like `weight_checks`, but in order: what does not hold here breaks nearly everything else, so the first that does not is
the only one told.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxft.core import tree
from jaxft.core import weight as weights
from jaxft.core.weight import Shared, Split, Weight
from jaxft.testing.claims import Broken, require
from jaxft.testing.report import told
from jaxft.testing.subject import F32, LAYERS, Subject


def wrap_gives_a_weight(s: Subject) -> None:
    """wrap(site) gives the Weight that stands for site.base."""
    try:
        w = _outermost(s.fresh)
    except NotImplementedError as error:
        raise Broken(str(error)) from None
    except Exception as error:
        raise Broken(f"wrap(site) raises {told(error)}") from None
    require(isinstance(w, Weight), f"wrap(site) gives a {type(w).__name__}; expected a Weight that holds site.base")
    plain = jax.tree_util.all_leaves([w])
    require(not plain, f"{type(w).__name__} is no pytree: decorate the class with @weight (jaxft.core.weight)")


def fields_have_roles(s: Subject) -> None:
    """The base is part of the model and frozen, other fields train, and static ones hold settings."""
    w = _outermost(s.fresh)
    cls, found = type(w).__name__, {f.name: weights.role(f) for f in dataclasses.fields(w)}
    listed = ", ".join(f"{name} ({role})" for name, role in found.items())
    declared = "`base: Any = parameter()`, and pass site.base for it"
    require("base" in found, f"{cls} has no field base; expected {declared}. Its fields: {listed}")
    require(
        found["base"] == weights.PARAMETER,
        f"{cls}.base is declared {found['base']}: the model's own weight would "
        f"{'train' if found['base'] == weights.TRAINABLE else 'be stored with the adapter'}; expected {declared}",
    )
    gated = "gate" in found or type(w).adapted is not Weight.adapted
    require(gated, f"{cls} has no field gate; expected `gate: Any`, to which wrap passes site.gate. Fields: {listed}")
    require(
        weights.TRAINABLE in found.values(),
        f"{cls} declares nothing to train; its fields: {listed}. Declare what trains, `a: Any = trainable()`",
    )
    for name, role in found.items():
        value = getattr(w, name)
        if role == weights.STATIC:
            require(
                _hashable(value),
                f"{cls}.{name} is static() and holds a {type(value).__name__}, which has no hash; expected a number, a "
                "text or a tuple of them. Leave static() out for an array",
            )
        if role == weights.TRAINABLE:
            for path, a in tree.arrays(value):
                wrong = f"{cls}.{'/'.join(filter(None, (name, path)))} trains and is {getattr(a, 'dtype', type(a))}"
                require(getattr(a, "dtype", F32) == F32, f"{wrong}; expected float32, which can hold small updates")


def arrays_are_stacked(s: Subject) -> None:
    """Every array of a field has the axes of the stack of layers first."""
    w = _outermost(s.fresh)
    wrong = []
    for path, a in _arrays(w):
        if not hasattr(a, "shape"):
            raise Broken(
                f"{type(w).__name__}.{path} holds the {type(a).__name__} {a!r}; expected an array [{LAYERS}, ...]: "
                "site.values(number) makes one for each layer (or declare the field static())"
            )
        if a.shape[:1] != (LAYERS,):
            wrong.append(f"{path} has shape {list(a.shape)}, expected [{', '.join(map(str, (LAYERS, *a.shape)))}]")
    if wrong:
        raise Broken(
            f"wrap gives the arrays of one layer, not of the stack of {LAYERS}: {'; '.join(wrong)}. Every array field "
            "begins with the axes of the stack: draw with site.draw(fn), or make (*site.layers.shape, ...)"
        )


def a_layer_multiplies(s: Subject) -> None:
    """x @ w of one layer has the shape of x @ base."""
    w = _outermost(s.fresh)
    defined = type(w).__rmatmul__ is not Weight.__rmatmul__
    require(defined, f"{type(w).__name__} has no __rmatmul__(self, x), which gives x @ w; expected one")
    layer = jax.eval_shape(lambda w: w[0], s.fresh)
    sizes = ", ".join(f"{path} {list(a.shape)}" for path, a in _arrays(_outermost(layer)))
    given = f"where x is {list(s.x.shape)}, the base {list(s.sizes)}, and of one layer {sizes}"
    try:
        with jax.numpy_dtype_promotion("standard"):  # dtypes are another property
            y = jax.eval_shape(lambda x, w: x @ w, s.x, layer)
    except Exception as error:
        raise Broken(f"x @ w raises {told(error)}; {given}") from None
    want = (*s.x.shape[:-1], s.sizes[1])
    got = getattr(y, "shape", None)
    require(got == want, f"x @ w gives {f'a {type(y).__name__}' if got is None else list(got)}, expected {list(want)}")


def _outermost(w: Any) -> Any:
    """The adapter around a weight, without the model's own bias around that."""
    while isinstance(w, Weight) and not w.adapter:
        w = w.base
    return w


def _arrays(w: Weight) -> Iterator[tuple[str, Any]]:
    """What the fields of a method hold, by path, but for what layers share and weights of their own."""
    for f in dataclasses.fields(w):  # type: ignore[arg-type]
        if f.name != "base" and weights.role(f) != weights.STATIC:
            held = jax.tree_util.tree_flatten_with_path(getattr(w, f.name), is_leaf=_is_whole)[0]
            yield from (("/".join(filter(None, (f.name, tree.join(p)))), a) for p, a in held if not _is_whole(a))


def _is_whole(a: Any) -> bool:
    return isinstance(a, Shared | Split | Weight)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


CHECKS: tuple[Callable[[Subject], None], ...] = (
    wrap_gives_a_weight,
    fields_have_roles,
    arrays_are_stacked,
    a_layer_multiplies,
)
