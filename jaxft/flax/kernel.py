"""A parameter of any shape as a matrix and back: what lets a method written for ``x @ w`` adapt it.

Flax stores kernels in the shape that suits their module: [in, heads, size], [heads, size, out], [3, 3, in, out], behind
the stacked axes of a scan. `Matrix` reads such an array as the matrix [*stack, in, out], its buffer shared; a method
wraps it like any base; and `Kernel` around both stands where the array stood, with its shape.

A `Layout` names axes of the parameter counted from its last one, so that they keep their names when a scan takes the
leading ones away.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core.weight import Affine, NotMergeable, Weight, parameter, static, weight


@dataclass(frozen=True)
class Layout:
    """Which axes of a parameter are the layers, the inputs and the outputs of its matrix; negative, each in order."""

    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


@weight
class Matrix(Weight):
    """An array ``base`` [*stack, ...] read as [*stack, in, out]; ``rows`` and ``columns`` are the other axes' roles."""

    base: Any = parameter()
    rows: tuple[int, ...] = static()
    columns: tuple[int, ...] = static()

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = self.base.shape
        stack = sizes[: len(sizes) - len(self.rows) - len(self.columns)]
        return (*stack, math.prod(sizes[a] for a in self.rows), math.prod(sizes[a] for a in self.columns))

    def __rmatmul__(self, x):
        return self._contract(x, self.rows)

    def take(self, ids):
        return self.dense()[ids]

    def unembed(self, x):
        return self._contract(x, self.columns)

    def _contract(self, x: jax.Array, over: tuple[int, ...]) -> jax.Array:
        """The product in the array's own shape: a reshaped copy of it would be kept for the backward pass."""
        split = x.reshape(*x.shape[:-1], *(self.base.shape[a] for a in over))
        inner = (tuple(range(x.ndim - 1, split.ndim)), _from_front(self.base.ndim, over))
        return jax.lax.dot_general(split, self.base.astype(x.dtype), (inner, ((), ()))).reshape(*x.shape[:-1], -1)

    def dense(self):
        stack = range(self.base.ndim - len(self.rows) - len(self.columns))
        order = (*stack, *_from_front(self.base.ndim, (*self.rows, *self.columns)))
        return jnp.transpose(self.base, order).reshape(self.shape)

    def merged(self):
        return self.dense()

    def axes(self, names):
        raise NotImplementedError("the axes of a Flax parameter are named by its own metadata")


@weight
class Kernel(Weight):
    """A weight ``base`` [*stack, in, out] in the place of a parameter whose shape is ``sizes``.

    ``use``: product, lookup or window, how the model uses it. ``bias``: the path of the parameter that is added to
    the product and belongs inside the map, for methods that map the output."""

    base: Any = parameter()
    sizes: tuple[int, ...] = static()
    layout: Layout = static()
    use: str = static(default="product")
    bias: str | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def merged(self):
        if isinstance(self.base, Affine):
            raise NotMergeable("its bias is a parameter of its own: jaxft.flax's own merge folds both")
        return as_parameter(self, self.base)


def make(array: Any, layout: Layout, use: str) -> Kernel:
    """The parameter as it is, ready to be wrapped. Stacked axes that do not lead are moved to the front (a copy)."""
    order = _stack_first(array.ndim, layout)
    place = {own: at - array.ndim for at, own in enumerate(order)}
    rows, columns = (tuple(place[a] for a in axes) for axes in (layout.rows, layout.columns))
    return Kernel(Matrix(_transposed(array, order), rows, columns), tuple(array.shape), layout, use)


def original(kernel: Kernel) -> jax.Array:
    """The array that `make` was given."""
    w = kernel.base
    while not isinstance(w, Matrix):
        w = w.base
    return _transposed(w.base, _inverse(_stack_first(w.base.ndim, kernel.layout)))


def rebased(kernel: Kernel, array: Any) -> Kernel:
    """The kernel on another array in the place of the one that `make` was given; on nothing, for None."""

    def on(w: Any) -> Any:
        if not isinstance(w, Matrix):
            return dataclasses.replace(w, base=on(w.base))
        base = None if array is None else _transposed(array, _stack_first(array.ndim, kernel.layout))
        return dataclasses.replace(w, base=base)

    return on(kernel)


def as_parameter(kernel: Kernel, matrix: jax.Array) -> jax.Array:
    """A matrix [*stack, in, out] in the shape of the parameter that ``kernel`` stands for."""
    layout = kernel.layout
    order = (*layout.stack, *layout.rows, *layout.columns)
    return _transposed(matrix.reshape([kernel.sizes[a] for a in order]), _inverse(order))


def with_bias(w: Any, bias: jax.Array | None) -> Any:
    """The weight with ``bias`` [*stack, out] (or none) in its Affine, which is empty while the model keeps the bias."""
    if isinstance(w, Affine):
        return w.base if bias is None else Affine(w.base, bias)
    return dataclasses.replace(w, base=with_bias(w.base, bias)) if isinstance(w, Weight) and w.adapter else w


def _stack_first(ndim: int, layout: Layout) -> tuple[int, ...]:
    return (*layout.stack, *(a for a in range(-ndim, 0) if a not in layout.stack))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(-len(order), 0), key=lambda at: order[at]))


def _transposed(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """The array itself where nothing moves."""
    return array if order == tuple(range(-array.ndim, 0)) else jnp.transpose(array, _from_front(array.ndim, order))


def _from_front(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a % ndim for a in axes)
