"""Reading jaxprs: every equation, however deep, and what a backward pass keeps."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a (closed) jaxpr, with those of the jaxprs inside it."""
    for eqn in (jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr).eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(value)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def said(eqn: Any) -> str:
    """An equation in one line: its operands and results by shape."""
    given, made = (", ".join(v.aval.str_short() for v in part) for part in (eqn.invars, eqn.outvars))
    return f"{eqn.primitive.name} of {given} gives {made}"


def matrix_products(jaxpr: Any, sizes: tuple[int, int]) -> list[str]:
    """The dots whose result is a matrix (or a stack of matrices) of ``sizes``, either way round."""
    return [
        said(eqn)
        for eqn in equations(jaxpr)
        if eqn.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general")
        and any(sorted(v.aval.shape[-2:]) == sorted(sizes) for v in eqn.outvars)
    ]


def computed_residuals(fn: Callable, *args: Any) -> list[tuple[int, ...]]:
    """Shapes of what the backward pass of ``fn`` keeps, besides its arguments and captured constants."""
    jaxpr = jax.make_jaxpr(lambda *a: jax.vjp(fn, *a)[1])(*args).jaxpr
    given = {id(v) for v in (*jaxpr.invars, *jaxpr.constvars)}
    return [v.aval.shape for v in jaxpr.outvars if not isinstance(v, core.Literal) and id(v) not in given]
