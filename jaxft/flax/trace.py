"""A function of parameters, run with adapted ones in the place of arrays.

`run` traces the function to a jaxpr and evaluates that, each parameter followed on its way (casts, transposes, splits
of an axis, the slices of a scan) to where it is used: a product, a look-up, a convolution. There the adapted weight
takes over, ``x @ w``, and W + AB is never formed. No module class is known or patched, so whatever Flax does around a
product (lifted transforms, shared modules, remat, mutable collections, metadata boxes) stays Flax's own.

The same walk over plain arrays that share a `Seen` tells how a model uses its parameters. One that goes into anything
else, such as a norm of itself, is used as it is; an adapted one is refused there by name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxft.core import tree
from jaxft.flax import uses
from jaxft.flax.held import Held, Product, bind, plain, regroup, sliced


def run(fn: Callable[[dict[str, Any]], Any], params: dict[str, Held]) -> Any:
    """``fn(arrays by path)`` with each parameter as `Held` says.

    Raises TypeError naming an adapted parameter that is used otherwise than it was adapted for."""
    shapes = {path: jax.ShapeDtypeStruct(h.value.shape, h.value.dtype) for path, h in params.items()}
    closed, out = jax.make_jaxpr(fn, return_shape=True)(shapes)
    values = _evaluate(closed, [params[path] for path in sorted(params)])
    return jax.tree.unflatten(jax.tree.structure(out), [plain(v, "the output") for v in values])


def _evaluate(jaxpr: Any, args: list[Any]) -> list[Any]:
    consts, jaxpr = (jaxpr.consts, jaxpr.jaxpr) if isinstance(jaxpr, core.ClosedJaxpr) else ((), jaxpr)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        rule = RULES.get(eqn.primitive.name)
        followed = rule is not None and any(isinstance(v, Held | Product) for v in values)
        outs = rule(eqn, values) if rule and followed else None
        if outs is None:
            outs = bind(eqn, [plain(v, eqn.primitive.name) for v in values])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _plain_all(jaxpr: Any, args: list[Any], user: str) -> list[Any]:
    return [plain(v, user) for v in _evaluate(jaxpr, args)]


# What a parameter may go through on its way.


def _moved(eqn: Any, h: Held, axes: Any) -> list[Any]:
    return [dataclasses.replace(h, value=h.value if h.adapted else bind(eqn, [h.value])[0], axes=axes)]


def _unchanged(eqn: Any, values: list[Any]) -> list[Any] | None:
    return _moved(eqn, values[0], values[0].axes) if isinstance(values[0], Held) else None


def _transpose(eqn: Any, values: list[Any]) -> list[Any] | None:
    h, order = values[0], eqn.params["permutation"]
    if isinstance(h, Held):
        return _moved(eqn, h, h.axes and tuple(h.axes[d] for d in order))
    shape, dims = tuple(h.shape[d] for d in order), tuple(order.index(d) for d in h.dims)
    return [Product(h.of, lambda bias: jnp.transpose(h.finish(bias), order), shape, dims)]


def _reshape(eqn: Any, values: list[Any]) -> list[Any] | None:
    h = values[0]
    if not isinstance(h, Held):
        return None
    axes = h.axes and regroup(h.axes, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)
    return None if h.adapted and axes is None else _moved(eqn, h, axes)


# Programs inside the program.


def _jit(eqn: Any, values: list[Any]) -> list[Any]:
    return _evaluate(eqn.params["jaxpr"], values)


def _remat(eqn: Any, values: list[Any]) -> list[Any]:
    values, through = _settled(values), dict[int, int]()

    def recomputed(*args: Any) -> list[Any]:
        return _results(_evaluate(eqn.params["jaxpr"], [*args]), [*args], through, "remat")

    outs = jax.checkpoint(recomputed, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(*values)
    return [values[through[i]] if i in through else y for i, y in enumerate(outs)]


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    p, values, through = eqn.params, _settled(values), dict[int, int]()
    first, n = p["num_consts"] + p["num_carry"], p["num_carry"]
    consts, start, xs = values[: p["num_consts"]], values[p["num_consts"] : first], values[first:]
    slices, whole = tree.hold_shared(xs)

    def body(carry: list[Any], part: list[Any]) -> tuple[list[Any], list[Any]]:
        layer = [sliced(x) for x in whole(part)]
        outs = _evaluate(p["jaxpr"], [*consts, *carry, *layer])
        return [plain(v, "the carry of a scan") for v in outs[:n]], _results(outs[n:], layer, through, "scan")

    settings = {name: p[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(body, [plain(v, "the carry of a scan") for v in start], slices, **settings)
    return [*carry, *(xs[through[i]] if i in through else y for i, y in enumerate(ys))]


def _results(outs: list[Any], given: list[Any], through: dict[int, int], user: str) -> list[Any]:
    """Results as arrays, but none for a parameter that is only handed through, as NNX's transforms do with all: that is
    noted in ``through`` and never copied."""
    for i, y in enumerate(outs):
        at = [j for j, value in enumerate(given) if value is y and isinstance(y, Held)]
        if at:
            through[i] = at[0]
    return [None if i in through else plain(y, user) for i, y in enumerate(outs)]


def _while(eqn: Any, values: list[Any]) -> list[Any]:
    p, values = eqn.params, _settled(values)
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test, body, carry = values[:first], values[first:second], values[second:]
    return jax.lax.while_loop(
        lambda state: _plain_all(p["cond_jaxpr"], [*test, *state], "while")[0],
        lambda state: _plain_all(p["body_jaxpr"], [*body, *state], "while"),
        [plain(v, "the carry of a loop") for v in carry],
    )


def _cond(eqn: Any, values: list[Any]) -> list[Any]:
    index, *operands = _settled(values)
    branches = [lambda *args, branch=branch: _plain_all(branch, [*args], "cond") for branch in eqn.params["branches"]]
    return jax.lax.switch(index, branches, *operands)


def _settled(values: list[Any]) -> list[Any]:
    """Without products that wait for their bias: those do not cross into another program."""
    return [plain(v, "another program") if isinstance(v, Product) else v for v in values]


RULES: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "convert_element_type": _unchanged,
    "copy": _unchanged,
    "name": _unchanged,
    "sharding_constraint": _unchanged,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _reshape,
    "jit": _jit,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "dot_general": uses.dot_general,
    "conv_general_dilated": uses.conv_general_dilated,
    "gather": uses.gather,
    "add": uses.add,
}
