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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxft.core.weight import Affine, Weight, parameter, static, weight


@dataclass(frozen=True)
class Layout:
    """Which axes of a parameter are the layers, the inputs and the outputs of its matrix; negative, each in order."""

    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


@weight
class Matrix(Weight):
    """An array ``base`` [*stack, ...] read as [*stack, in, out]; ``rows`` and ``columns`` are the other axes' roles.

    ``result``: dtype of a product that the model asked to be wider than what is multiplied; None: that of the input."""

    base: Any = parameter()
    rows: tuple[int, ...] = static()
    columns: tuple[int, ...] = static()
    result: Any = static(default=None)
    adapter: ClassVar[bool] = False

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
        y = jax.lax.dot_general(split, self.base.astype(x.dtype), (inner, ((), ())), preferred_element_type=self.result)
        return y.reshape(*x.shape[:-1], -1)

    def dense(self):
        stack = range(self.base.ndim - len(self.rows) - len(self.columns))
        order = (*stack, *_from_front(self.base.ndim, (*self.rows, *self.columns)))
        return jnp.transpose(self.base, order).reshape(self.shape)

    def axes(self, names):
        raise NotImplementedError("the axes of a Flax parameter are named by its own metadata")


@weight
class KeptBias(Affine):
    """An Affine whose bias is a parameter of its own in the model: `with_bias` puts it here where it is used."""

    adapter: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False


@weight
class Kernel(Weight):
    """A weight ``base`` [*stack, in, out] in the place of a parameter whose shape is ``sizes``.

    ``stack``, ``rows``, ``columns``: its `Layout`. ``use``: product, lookup or window, how the model uses it. ``bias``:
    the path of the parameter that is added to every product: what a method that maps the output must see (`KeptBias`),
    and what a constant of the adapter is merged into; None where there is none."""

    base: Any = parameter()
    sizes: tuple[int, ...] = static()
    stack: tuple[int, ...] = static()
    rows: tuple[int, ...] = static()
    columns: tuple[int, ...] = static()
    use: str = static(default="product")
    bias: str | None = static(default=None)

    @property
    def layout(self) -> Layout:
        return Layout(self.stack, self.rows, self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def merged(self):
        return as_parameter(self, self.base)


def make(array: Any, layout: Layout, use: str, bias: str | None) -> Kernel:
    """The parameter as it is, ready to be wrapped."""
    return settled(Kernel(array, tuple(array.shape), layout.stack, layout.rows, layout.columns, use, bias))


def root(w: Any) -> Any:
    """What all wrappers of a weight stand on: a `Matrix`, or what was put there by `on`."""
    return root(w.base) if isinstance(w, Weight) and not isinstance(w, Matrix) else w


def on(w: Any, new: Any) -> Any:
    """The weight with ``new`` for a root."""
    if not isinstance(w, Weight) or isinstance(w, Matrix):
        return new
    return dataclasses.replace(w, base=on(w.base, new))  # type: ignore[type-var]


def original(kernel: Kernel) -> jax.Array:
    """The parameter that is adapted, as it was."""
    base = root(kernel).base
    return _transposed(base, _inverse(_stack_first(base.ndim, kernel.stack)))


def settled(kernel: Kernel) -> Kernel:
    """The kernel on a parameter as the model has it, which is made its matrix.

    Stacked axes that do not lead are moved to the front, in a copy."""
    array = root(kernel)
    order = _stack_first(array.ndim, kernel.stack)
    place = {own: at - array.ndim for at, own in enumerate(order)}
    rows, columns = (tuple(place[a] for a in axes) for axes in (kernel.rows, kernel.columns))
    return on(kernel, Matrix(_transposed(array, order), rows, columns))


def as_parameter(kernel: Kernel, matrix: jax.Array) -> jax.Array:
    """A matrix [*stack, in, out] in the shape of the parameter that ``kernel`` stands for."""
    order = (*kernel.stack, *kernel.rows, *kernel.columns)
    return _transposed(matrix.reshape([kernel.sizes[a] for a in order]), _inverse(order))


def keeps_bias(w: Any) -> bool:
    """Whether the weight maps the output, bias included."""
    return isinstance(w, KeptBias) or (isinstance(w, Weight) and not isinstance(w, Matrix) and keeps_bias(w.base))


def with_bias(w: Any, bias: jax.Array | None) -> Any:
    """The weight with ``bias`` [*stack, out] (or none) in the place that is kept for it."""
    if isinstance(w, KeptBias):
        return w.base if bias is None else Affine(w.base, bias)
    return w if isinstance(w, Matrix) else dataclasses.replace(w, base=with_bias(w.base, bias))


def _stack_first(ndim: int, stack: tuple[int, ...]) -> tuple[int, ...]:
    return (*stack, *(a for a in range(-ndim, 0) if a not in stack))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(-len(order), 0), key=lambda at: order[at]))


def _transposed(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """The array itself where nothing moves."""
    return array if order == tuple(range(-array.ndim, 0)) else jnp.transpose(array, _from_front(array.ndim, order))


def _from_front(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a % ndim for a in axes)
