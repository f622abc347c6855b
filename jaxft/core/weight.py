"""Weights: anything that ``x @ w`` works on.

A model is a pure function over nested dicts whose leaves are weights. A weight is a plain array ``[..., in, out]`` or
a `Weight`: a small frozen dataclass, registered as a pytree, that says what ``x @ w`` means. Model code writes
``x @ p["q"]`` and knows nothing of adapters or quantisation.

Unusual: `Weight` never defines ``__jax_array__``. JAX would try it before ``__rmatmul__`` and silently build the dense
matrix and its dense gradient; without it a stray ``jnp.dot(x, w)`` raises a TypeError at once.
"""

import dataclasses
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

T = TypeVar("T")
STATIC, TRAINABLE, PARAMETER, FROZEN = "static", "trainable", "parameter", "frozen"


class NotMergeable(ValueError):
    """The map that an adapter applies cannot be written as one plain weight."""


def static(default: Any = dataclasses.MISSING) -> Any:
    """Declares a field that belongs to the structure (and so to the jit key): never something that is swept."""
    return dataclasses.field(default=default, metadata={"role": STATIC})


def trainable(default: Any = dataclasses.MISSING) -> Any:
    """Declares a field whose arrays the method trains."""
    return dataclasses.field(default=default, metadata={"role": TRAINABLE})


def parameter(default: Any = dataclasses.MISSING) -> Any:
    """Declares a field that is part of the model itself (a base, a bias): frozen unless selected by a pattern."""
    return dataclasses.field(default=default, metadata={"role": PARAMETER})


def role(field: dataclasses.Field) -> str:
    """The declared role of a field; an undecorated one is a frozen constant, never trained, never cast."""
    return field.metadata.get("role", FROZEN)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, trainable, parameter))
def weight(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass registered as a pytree, static fields in the treedef."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    meta = [f.name for f in fields if role(f) == STATIC]
    return jax.tree_util.register_dataclass(cls, [f.name for f in fields if f.name not in meta], meta)


class Weight:
    """Base of every leaf that is not a plain array.

    Shapes are those of the matrix it stands for, ``[*stack, in, out]`` (``[vocab, features]`` for an embedding).
    Subclasses with a field ``base`` inherit shape, dtype and the verbs from it and override what they change.
    """

    __array_ufunc__ = None  # numpy hands `x @ w` over instead of iterating over w
    adapter: ClassVar[bool] = True  # wraps a base that `strip` gives back; False for parts of the model itself
    tied: bool | None = None  # a field of what may stand at an embedding: see InPlace
    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """``x``: [..., in] -> [..., out], in the dtype of ``x``."""
        raise NotImplementedError

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows ``ids`` of an embedding ``[vocab, features]``: int32[...] -> [..., features]."""
        raise TypeError(f"{type(self).__name__} cannot be looked up as an embedding")

    def unembed(self, x: jax.Array) -> jax.Array:
        """``x @ w.T`` for a tied head: [..., features] -> [..., vocab]."""
        raise TypeError(f"{type(self).__name__} cannot serve as a tied head")

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Grouped product for experts: x[tokens, in], w[experts, in, out], group_sizes int32[experts]."""
        raise TypeError(f"{type(self).__name__} cannot hold experts")

    def unshard(self) -> "Weight":
        """The same weight with its stored bytes gathered before use; wrappers pass it on to their base."""
        base = self.base
        return dataclasses.replace(self, base=base.unshard()) if isinstance(base, Weight) else self  # type: ignore[type-var]

    def dense(self) -> jax.Array:
        """The matrix this stands for, in the dtype it was made from."""
        raise NotImplementedError

    def merged(self) -> Any:
        """The plain weight equal to this adapter on its base; raises NotMergeable where there is none."""
        raise NotMergeable(f"{type(self).__name__} is not a map on the weight: it cannot be merged")

    def axes(self, names: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        """Logical axis names of the fields, given those of the dense weight ``(*stack, in, out)``."""
        return {"base": names}

    def __getitem__(self, index: Any) -> "Weight":
        """Indexes the stack (layer) axis of every array."""
        return jax.tree.map(lambda a: a[index], self, is_leaf=lambda a: isinstance(a, Split))

    def __repr__(self) -> str:
        parts = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, Weight):
                value = f"{value.dtype}[{','.join(map(str, value.shape))}]"
            parts.append(f"{f.name}={value}")
        return f"{type(self).__name__}({', '.join(parts)})"


@weight
class Affine(Weight):
    """``x @ base + bias``: every linear layer with a bias. ``bias``: [*stack, out]."""

    base: Any = parameter()
    bias: Any = parameter()
    adapter: ClassVar[bool] = False

    def __rmatmul__(self, x):
        return x @ self.base + self.bias.astype(x.dtype)

    def ragged_dot(self, x, group_sizes):
        y = _ragged_dot(self.base, x, group_sizes)
        return y + jnp.repeat(self.bias.astype(x.dtype), group_sizes, axis=0, total_repeat_length=x.shape[0])

    def dense(self):
        """The matrix without the bias."""
        return self.base.dense() if isinstance(self.base, Weight) else self.base

    def axes(self, names):
        return {"base": names, "bias": (*names[:-2], names[-1])}


@weight
class InPlace(Weight):
    """A whole weight trained in place of ``base`` (peft's ``modules_to_save``); the original stays for `strip`.

    ``value`` is ``base`` without compression: an array, or an Affine of arrays (its bias trains too), in float32.
    ``tied``: whether a head tied to this embedding follows the trained value (True) or keeps reading the original
    (False, peft's default); None where no head is tied to it.
    """

    base: Any = parameter()
    value: Any = trainable()
    tied: bool | None = static(default=None)

    def __rmatmul__(self, x):
        return x @ jax.tree.map(lambda v: v.astype(x.dtype), self.value)

    def take(self, ids):
        return self.value[ids].astype(self.dtype)

    def unembed(self, x):
        return x @ self.value.astype(x.dtype).T if self.tied else _unembed(self.base, x)

    def ragged_dot(self, x, group_sizes):
        return _ragged_dot(jax.tree.map(lambda v: v.astype(x.dtype), self.value), x, group_sizes)

    def astype(self, dtype: Any) -> jax.Array:
        """The trained values: what a norm asks of its vectors."""
        return self.value.astype(dtype)

    def dense(self):
        value = self.value.dense() if isinstance(self.value, Weight) else self.value
        return value.astype(self.dtype)

    def merged(self):
        value = jax.tree.map(lambda v: v.astype(self.dtype), self.value)
        return Untied(value, self.base) if self.tied is False else value

    def axes(self, names):
        return {"base": names, "value": names}


@weight
class Untied(Weight):
    """An embedding ``base`` and the tied ``head`` it no longer equals, both [vocab, features].

    What is left of a tied embedding when an adapter that changed only the look-up is merged: on disk, two tensors.
    """

    base: Any = parameter()
    head: Any = parameter()
    adapter: ClassVar[bool] = False

    def __rmatmul__(self, x):
        return x @ self.base

    def take(self, ids):
        return self.base.take(ids) if isinstance(self.base, Weight) else self.base[ids]

    def unembed(self, x):
        return _unembed(self.head, x)

    def dense(self):
        return self.base.dense() if isinstance(self.base, Weight) else self.base

    def axes(self, names):
        return {"base": names, "head": names}


def _unembed(w: Any, x: jax.Array) -> jax.Array:
    return w.unembed(x) if isinstance(w, Weight) else x @ w.T


def _ragged_dot(w: Any, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return w.ragged_dot(x, group_sizes) if isinstance(w, Weight) else jax.lax.ragged_dot(x, w, group_sizes)


@jax.tree_util.register_pytree_with_keys_class
class Split:
    """A stack ``[L, ...]`` held as L separate arrays, so that unrolled layers read theirs without a slice copy."""

    def __init__(self, parts: tuple):
        self.parts = tuple(parts)

    def __getitem__(self, index: int) -> jax.Array:
        return self.parts[index]

    @property
    def ndim(self) -> int:
        return 1 + self.parts[0].ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.SequenceKey(i), p) for i, p in enumerate(self.parts)], None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(parts)

    def __repr__(self) -> str:
        return f"Split({len(self.parts)} x {jnp.dtype(self.dtype).name}{list(self.parts[0].shape)})"
