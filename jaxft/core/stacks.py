"""What the layers of a stack may be besides slices of one array ``[L, ...]``: held one by one, or all the same one."""

from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_pytree_with_keys_class
class Split:
    """A stack ``[L, ...]`` held as L separate arrays, so that unrolled layers read theirs without a slice copy.

    A layer that has no array is None: it has no value of its own, gets no gradient and takes no memory."""

    def __init__(self, parts: tuple):
        self.parts = tuple(parts)

    def __getitem__(self, index: int) -> jax.Array:
        return self.parts[index]

    @property
    def ndim(self) -> int:
        return 1 + self._first.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self._first.shape)

    @property
    def dtype(self) -> Any:
        return self._first.dtype

    @property
    def whole(self) -> bool:
        """Whether every layer has an array."""
        return not any(part is None for part in self.parts)

    @property
    def _first(self) -> Any:
        return next(part for part in self.parts if part is not None)

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.SequenceKey(i), p) for i, p in enumerate(self.parts)], None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(parts)

    def __repr__(self) -> str:
        return f"Split({len(self.parts)} x {jnp.dtype(self.dtype).name}{list(self._first.shape)})"


@jax.tree_util.register_pytree_with_keys_class
class Shared:
    """An array that all layers of a stack have in common: a layer of it is itself, and a scan closes over it."""

    def __init__(self, value: jax.Array):
        self.value = value

    def __getitem__(self, index: Any) -> "Shared":
        return self

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("value"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __repr__(self) -> str:
        return f"Shared({self.value})"
