"""A layer of a stack of packed matrices, read where it lies.

A scan over layers hands each turn a slice, which XLA copies before a kernel may read it: for a product with few rows,
which is little more than reading the matrix once, that copy takes longer than the product. Here the scan closes over
the whole stack and a turn has the number of its layer, which the kernel looks up. Only for passes without a gradient (a
gradient would be one of the whole stack).
"""

from typing import Any, ClassVar

import jax

from jaxft.core.weight import Weight, is_packed, parameter, weight


@weight
class Indexed(Weight):
    """Layer ``index`` (int32[]) of ``base``, a packed weight ``[L, in, out]`` that says what `Weight.product_at` is."""

    base: Any = parameter()
    index: Any = 0
    adapter: ClassVar[bool] = False
    packed: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape[1:])

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def dense_dtype(self) -> Any:
        return self.base.dense_dtype

    def __rmatmul__(self, x):
        return self.base.product_at(x, self.index)

    def unembed(self, x):
        return alone(self.base, self.index).unembed(x)

    def dense(self):
        return alone(self.base, self.index).dense()

    def __getitem__(self, index: Any) -> "Indexed":
        """Itself: it has the whole stack, and `at` says which layer of it."""
        return self


def in_place(stack: Any) -> Any:
    """``stack`` with the packed matrices that can be read in place marked as such, but for stacked adapters'."""
    whole = lambda w: is_packed(w) or (isinstance(w, Weight) and w.several)  # noqa: E731
    return jax.tree.map(lambda w: Indexed(w) if is_packed(w) and w.in_place else w, stack, is_leaf=whole)


def at(layer: Any, index: Any) -> Any:
    """A layer's parameters, those that are read in place being the layer ``index`` of their stacks."""
    return jax.tree.map(lambda w: Indexed(w.base, index) if is_indexed(w) else w, layer, is_leaf=is_indexed)


def alone(stack: Any, index: Any) -> Any:
    """A layer cut out of its stack."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)


def is_indexed(w: Any) -> bool:
    return isinstance(w, Indexed)
