"""Where parameters are used: products, look-ups and convolutions, and the bias added to a product.

Each rule takes an equation and its operands, some of them `Held` or `Product`, and returns its results, or None for
what it does not understand.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import verbs
from jaxft.core.weight import Shared
from jaxft.flax import kernel as kernels
from jaxft.flax.held import Held, Product, bind, layout_of, plain
from jaxft.flax.kernel import Kernel, Layout, with_bias
from jaxft.flax.windows import Windows

FILL = jax.lax.GatherScatterMode.FILL_OR_DROP


def dot_general(eqn: Any, values: list[Any]) -> list[Any] | None:
    """A product with any contraction and batch axes, the parameter on either side."""
    side = 1 if isinstance(values[1], Held) else 0
    h, x = values[side], plain(values[1 - side], "the other side of a product")
    if not isinstance(h, Held) or h.axes is None:
        return None
    (ours, theirs), (stack, over) = (pair if side == 0 else pair[::-1] for pair in eqn.params["dimension_numbers"])
    free = [d for d in range(len(h.axes)) if d not in (*ours, *stack)]
    layout = layout_of(h, stack, ours, free)
    if layout is None or (h.adapted and not _covers(h.value, layout)):
        return None
    # x as [*batch, *kept, in] and the result as [*batch, *kept, out], the parameter's axes in its own order
    theirs, over = _by_axes(h, ours, theirs), _by_axes(h, stack, over)
    kept = [d for d in range(x.ndim) if d not in (*theirs, *over)]
    columns = _by_axes(h, free, free)
    made = [*(("x", d) for d in (*over, *kept)), *(("w", d) for d in columns)]
    sides = [[("x", d) for d in kept], [("w", d) for d in free]]
    wanted = [*(("x", d) for d in eqn.params["dimension_numbers"][1][1 - side]), *sides[1 - side], *sides[side]]
    shape, dtype = eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype

    def multiply(w: Any) -> jax.Array:
        own = jnp.promote_types(x.dtype, eqn.invars[side].aval.dtype)
        if jnp.promote_types(own, dtype) != own:
            w = kernels.on(w, dataclasses.replace(kernels.root(w), result=dtype))
        rows = jnp.transpose(x.astype(own), (*over, *kept, *theirs))
        with _precision(eqn.params["precision"]):
            y = _product(rows.reshape(*rows.shape[: x.ndim - len(theirs)], -1), w, len(over), layout != h.value.layout)
        y = y.reshape([shape[wanted.index(axis)] for axis in made])
        return jnp.transpose(y, [made.index(axis) for axis in wanted]).astype(dtype)

    dims = tuple(wanted.index(axis) for axis in made if axis[0] == "w" or axis[1] in over)
    return [_finished(eqn, values, h, "product", layout, multiply, dims)]


def conv_general_dilated(eqn: Any, values: list[Any]) -> list[Any] | None:
    """A convolution with features last and without groups."""
    x, h = plain(values[0], "the input of a convolution"), values[1]
    settings, n = eqn.params, x.ndim
    specs = settings["dimension_numbers"]
    groups = (settings["feature_group_count"], settings["batch_group_count"])
    if not isinstance(h, Held) or h.axes is None or list(h.axes) != sorted(h.axes) or groups != (1, 1):
        return None
    layout = layout_of(h, [], list(range(n - 1)), [n - 1])
    features = (specs.lhs_spec[1], specs.rhs_spec[0], specs.out_spec[1])
    if layout is None or features != (n - 1,) * 3 or (h.adapted and h.value.layout != layout):
        return None
    out = eqn.outvars[0].aval

    def multiply(w: Any) -> jax.Array:
        wide = jnp.promote_types(x.dtype, out.dtype)
        windows = Windows(x.astype(wide), eqn.invars[1].aval.shape[:-1], tuple(sorted(settings.items())))
        return (windows @ w).astype(out.dtype)

    return [_finished(eqn, values, h, "window", layout, multiply, (n - 1,))]


def gather(eqn: Any, values: list[Any]) -> list[Any] | None:
    """The look-up of rows of an embedding: ``jnp.take(w, ids, axis=0)`` or ``w[ids]``."""
    h, ids = values[0], plain(values[1], "an index")
    at, n = eqn.params["dimension_numbers"], values[1].ndim - 1
    if not isinstance(h, Held) or h.axes is None:
        return None
    table = eqn.invars[0].aval.shape
    simple = (at.collapsed_slice_dims, at.start_index_map, at.operand_batching_dims) == ((0,), (0,), ())
    whole = eqn.params["slice_sizes"] == (1, *table[1:]) and at.offset_dims == tuple(range(n, n + len(table) - 1))
    layout = layout_of(h, [], [0], list(range(1, len(table)))) if simple and whole else None
    if layout is None or (h.adapted and (h.value.use, h.value.layout) != ("lookup", layout)):
        return None
    if not h.adapted:
        return [_seen(eqn, values, h, "lookup", layout)]
    ids, out = ids[..., 0], eqn.outvars[0].aval
    rows = h.value.base.take(jnp.clip(ids, 0, table[0] - 1)).reshape(out.shape).astype(out.dtype)
    if eqn.params["mode"] == FILL:
        inside = ((ids >= 0) & (ids < table[0])).reshape(*ids.shape, *[1] * (len(table) - 1))
        fill = eqn.params["fill_value"]
        rows = jnp.where(inside, rows, jnp.asarray(jnp.nan if fill is None else fill, out.dtype))
    return [rows]


def add(eqn: Any, values: list[Any]) -> list[Any] | None:
    """The bias of a product, which a map on the output has to see."""
    product = next((v for v in values if isinstance(v, Product)), None)
    bias = next((v for v in values if isinstance(v, Held)), None)
    if product is None or bias is None:
        return None
    of, dims = product.of, product.dims
    if of.seen is not None:
        of.seen.biases.setdefault(of.path, set()).add(bias.path)
        return bind(eqn, [product.finish(None) if v is product else bias.value for v in values])
    if not of.adapted or bias.path != of.value.bias:
        return None
    others = tuple(d for d in range(len(product.shape)) if d not in dims)
    value = jnp.transpose(jnp.broadcast_to(bias.value, product.shape), (*others, *dims))[(0,) * len(others)]
    return [product.finish(value)]


def _finished(eqn: Any, values: list[Any], h: Held, use: str, layout: Layout, multiply: Any, dims: tuple[int, ...]):
    """The product, or what makes it once its bias is known."""
    shape = eqn.outvars[0].aval.shape
    if not h.adapted:
        y = _seen(eqn, values, h, use, layout)
        return Product(h, lambda bias: y, shape, dims)
    kernel = h.value
    stack = tuple(kernel.sizes[a] for a in layout.stack[len(h.walked) :])

    def finish(bias: jax.Array | None) -> jax.Array:
        try:
            return multiply(with_bias(kernel.base, None if bias is None else bias.reshape(*stack, -1)))
        except TypeError as error:
            raise TypeError(f"{h.path}, used as a {use}: {error}") from error

    return Product(h, finish, shape, dims) if kernels.keeps_bias(kernel.base) else finish(None)


def _seen(eqn: Any, values: list[Any], h: Held, use: str, layout: Layout) -> Any:
    if h.seen is not None:
        h.seen.uses.setdefault(h.path, set()).add((use, layout))
    return bind(eqn, [v.value if v is h else plain(v, eqn.primitive.name) for v in values])[0]


def _covers(kernel: Kernel, layout: Layout) -> bool:
    """Whether a product is the one the kernel was adapted for, or that of a head tied to an embedding."""
    tied = kernel.use == "lookup" and layout == dataclasses.replace(
        kernel.layout, rows=kernel.layout.columns, columns=kernel.layout.rows
    )
    return kernel.use != "window" and (tied or layout == kernel.layout)


def _product(x: jax.Array, w: Any, batch: int, tied: bool) -> jax.Array:
    """``x @ w`` (or ``x @ w.T``), mapped over leading axes that both share."""
    if not batch:
        return verbs.unembed(w, x) if tied else x @ w
    over = jax.tree.map(lambda a: None if isinstance(a, Shared) else 0, w, is_leaf=lambda a: isinstance(a, Shared))
    return jax.vmap(lambda x, w: _product(x, w, batch - 1, tied), in_axes=(0, over))(x, w)


def _by_axes(h: Held, ours: Any, values: Any) -> list[int]:
    """``values`` of our axes in the parameter's own order."""
    axes = h.axes or ()
    return [value for _, value in sorted(zip(ours, values, strict=True), key=lambda pair: axes[pair[0]])]


def _precision(asked: Any) -> contextlib.AbstractContextManager:
    """All products at the precision that the model asked for."""
    one = asked[0] if isinstance(asked, tuple) else asked
    if isinstance(one, jax.lax.Precision):
        return jax.default_matmul_precision(one.name.lower())
    return contextlib.nullcontext() if one is None else jax.default_matmul_precision(one.name)
