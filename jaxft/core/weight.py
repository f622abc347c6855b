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

from jaxft.core.stacks import Shared, Split

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
    Subclasses with a field ``base`` inherit shape, dtype and the verbs from it and override what they change; all that
    an adapter must say is what ``x @ w`` means for one layer.
    """

    __array_ufunc__ = None  # numpy hands `x @ w` over instead of iterating over w
    adapter: ClassVar[bool] = True  # wraps a base that `strip` gives back; False for parts of the model itself
    packed: ClassVar[bool] = False  # a matrix of the model in few bits: frozen `codes` and what scales them
    several: ClassVar[bool] = False  # `core.many`: what it holds are parts of weights
    in_place: bool = False  # packed: whether a stack can be multiplied layer by layer where it lies (`core.indexed`)
    mergeable: ClassVar[bool] = True  # whether `x @ w` is `x` times a matrix plus a constant
    linear: ClassVar[tuple[str, ...]] = ()  # fields: of a multiple of them, `x @ w - x @ base` is that multiple
    noted: ClassVar[tuple[str, ...]] = ("rate",)  # static fields that `x @ w` without dropout does not depend on
    tied: bool | None = None  # a field of what may stand at an embedding: see InPlace
    gate: Any  # a field of adapters, float32[*stack]: 1 where a layer is adapted, 0 where the map is the identity
    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return dense_dtype(self.base)

    @property
    def dense_dtype(self) -> Any:
        """The dtype of `dense`: that of the weight, unless it is packed."""
        return self.dtype

    @property
    def adapted(self) -> jax.Array:
        """bool[*stack]: the layers that the adapter changes."""
        return jnp.asarray(self.gate) > 0

    def off(self) -> "Weight":
        """The same adapter doing nothing in any layer."""
        return dataclasses.replace(self, gate=jnp.zeros_like(self.gate))  # type: ignore[type-var]

    def upon(self, base: Any) -> "Weight":
        """The same map around another base."""
        return dataclasses.replace(self, base=base)  # type: ignore[type-var]

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """``x``: [..., in] -> [..., out], in the dtype of ``x``."""
        raise NotImplementedError

    def plus(self, x: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
        """``x @ w + u @ v``, u [..., r], v [r, out] in the dtype of x, for a weight that has a faster way to add."""
        return x @ self + u @ v

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows ``ids`` of an embedding ``[vocab, features]``: int32[...] -> [..., features]."""
        raise TypeError(f"{type(self).__name__} cannot be looked up as an embedding")

    def unembed(self, x: jax.Array) -> jax.Array:
        """``x @ w.T`` for a tied head: [..., features] -> [..., vocab]."""
        raise TypeError(f"{type(self).__name__} cannot serve as a tied head")

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Grouped product for experts: x[tokens, in], w[experts, in, out], group_sizes int32[experts]."""
        raise TypeError(f"{type(self).__name__} cannot hold experts")

    def dense(self) -> jax.Array:
        """The matrix this stands for, in the dtype it was made from: by default what the map makes of the identity."""
        return _affine(self)[0].astype(self.dtype)

    def merged(self) -> Any:
        """The plain weight equal to this adapter on its base; raises NotMergeable where there is none."""
        if isinstance(_mergeable(self).base, Affine):
            matrix, constant = _affine(self)
            return Affine(matrix.astype(self.dtype), constant.astype(self.base.bias.dtype))
        return self.dense()

    def axes(self, names: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        """Logical axis names of the fields, given those of the dense weight ``(*stack, in, out)``.

        By default all but the base are whole on every device, stacked like it."""
        stack = names[:-2]

        def of(value: Any) -> tuple[str | None, ...]:
            own = () if isinstance(value, Shared) else stack
            return (*own, *[None] * (value.ndim - len(own)))

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if role(f) != STATIC}  # type: ignore[arg-type]
        return {n: names if n == "base" else of(v) for n, v in fields.items() if n == "base" or hasattr(v, "ndim")}

    def __getitem__(self, index: Any) -> "Weight":
        """Indexes the stack (layer) axis of every array. Raises IndexError for a packed matrix that has none: its rows
        lie in several arrays, each cut in another way."""
        if self.packed and self.ndim < 3 and index is not None and index is not ...:
            raise IndexError(f"{self!r} has no layers to index; its numbers are in dense()")
        return jax.tree.map(lambda a: a[index], self, is_leaf=lambda a: isinstance(a, Split | Shared))

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

    ``value`` is ``base`` without compression: an array, or an Affine of arrays (its bias trains too), in float32. Where
    only some layers of a stack train, it holds theirs alone, each array a `Split` with None for the others.
    ``tied``: whether a head tied to this embedding follows the trained value (True) or keeps reading the original
    (False, peft's default); None where no head is tied to it.
    """

    base: Any = parameter()
    value: Any = trainable()
    tied: bool | None = static(default=None)

    def _now(self, dtype: Any) -> Any:
        """What stands in place of ``base``: the trained value in that dtype; the base itself in a layer without one."""
        held = jax.tree.leaves(self.value)
        return jax.tree.map(lambda v: v.astype(dtype), self.value) if held else self.base

    def __rmatmul__(self, x):
        return x @ self._now(x.dtype)

    def off(self):
        def was(v: Any, w: jax.Array) -> Any:
            w = w.astype(jnp.float32)
            return Split(tuple(None if p is None else w[i] for i, p in enumerate(v.parts))) if _is_split(v) else w

        return dataclasses.replace(self, value=jax.tree.map(was, self.value, plain(self.base), is_leaf=_is_split))

    def take(self, ids):
        return self.value[ids].astype(self.dtype)

    def unembed(self, x):
        return x @ self.value.astype(x.dtype).T if self.tied else _unembed(self.base, x)

    def ragged_dot(self, x, group_sizes):
        return _ragged_dot(self._now(x.dtype), x, group_sizes)

    def astype(self, dtype: Any) -> jax.Array:
        """The trained values: what a norm asks of its vectors."""
        return self._now(dtype).astype(dtype)

    def dense(self):
        return _dense(self._whole())

    def merged(self):
        return Untied(self._whole(), self.base) if self.tied is False else self._whole()

    def _whole(self) -> Any:
        """The value of every layer in the dtype of the base, the base's own where none is trained."""
        if not any(map(_is_split, jax.tree.leaves(self.value, is_leaf=_is_split))):
            return plain(self._now(self.dtype))

        def layers(v: Split, w: jax.Array) -> jax.Array:
            return jnp.stack([w[i] if p is None else p.astype(w.dtype) for i, p in enumerate(v.parts)])

        return jax.tree.map(layers, self.value, plain(self.base), is_leaf=_is_split)

    def axes(self, names):
        return {"base": names, "value": names}


@weight
class Untied(Weight):
    """An embedding ``base`` and the tied ``head`` it no longer equals, both [vocab, features].

    What is left of a tied embedding when an adapter that changed only the look-up is merged: on disk, two tensors. An
    adapted head reads the embedding by a `Transposed`, and what the look-up has become where ``base.tied`` is True.
    """

    base: Any = parameter()
    head: Any = parameter()
    adapter: ClassVar[bool] = False

    def __rmatmul__(self, x):
        return x @ self.base

    def take(self, ids):
        return self.base.take(ids) if isinstance(self.base, Weight) else self.base[ids]

    def unembed(self, x):
        return _unembed(self.followed().head, x)

    def followed(self) -> "Untied":
        """The same with the head on the look-up as it is now, if it follows that."""
        follows = isinstance(self.base, Weight) and self.base.tied
        return dataclasses.replace(self, head=_upon(self.head, self.base)) if follows else self

    def dense(self):
        return self.base.dense() if isinstance(self.base, Weight) else self.base

    def axes(self, names):
        return {"base": names, "head": names}


@weight
class Transposed(Weight):
    """An embedding ``base`` [vocab, features] read as the head's matrix [features, vocab], its buffer shared."""

    base: Any = parameter()
    adapter: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.base.shape[:-2], *self.base.shape[:-3:-1])

    def __rmatmul__(self, x):
        return _unembed(self.base, x)

    def dense(self):
        return jnp.swapaxes(_dense(self.base), -1, -2)

    def axes(self, names):
        return {"base": (*names[:-2], *names[:-3:-1])}


@weight
class Head(Transposed):
    """Any weight ``base`` [features, vocab] as the tied head of an embedding, standing as [vocab, features]."""

    def __rmatmul__(self, x):
        raise TypeError("a head is only ever multiplied by its transpose: unembed")

    def unembed(self, x):
        return x @ self.base


class Slot(Weight):
    """What is trained at a place of its own in the parameters (a prompt, a prefix) and is no map on a weight; ``dense``
    makes the array, of ``shape``, that the model reads."""

    mergeable: ClassVar[bool] = False

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.float32)

    def axes(self, names: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:  # all whole on every device
        return {f.name: () for f in dataclasses.fields(self) if role(f) != STATIC}  # type: ignore[arg-type]


def _upon(head: Any, lookup: Any) -> Any:
    """An adapted head with ``lookup`` in place of the embedding that it reads."""
    return Transposed(lookup) if type(head) is Transposed else head.upon(_upon(head.base, lookup))


def is_packed(w: Any) -> bool:
    """Whether ``w`` itself, no weight around it, is a matrix in few bits."""
    return isinstance(w, Weight) and w.packed


def dense_dtype(w: Any) -> Any:
    """The dtype of the matrix that ``w`` stands for."""
    return w.dense_dtype if isinstance(w, Weight) else w.dtype


def plain(w: Any) -> Any:
    """A weight without compression: an array, or an Affine of arrays."""
    return Affine(_dense(w.base), w.bias) if isinstance(w, Affine) else _dense(w)


def _dense(w: Any) -> jax.Array:
    return w.dense() if isinstance(w, Weight) else w


def _mergeable(w: Weight) -> Weight:
    """The weight itself. Raises NotMergeable if it is no matrix plus a constant."""
    if not w.mergeable:
        raise NotMergeable(f"{type(w).__name__} is not a map on the weight: it cannot be merged")
    return w


def _affine(w: Weight) -> tuple[jax.Array, jax.Array]:
    """The matrix and the constant of the map ``x @ w``, float32, layer by layer."""
    if len(_mergeable(w).shape) > 2:
        over = jax.tree.map(lambda a: None if isinstance(a, Shared) else 0, w, is_leaf=lambda a: isinstance(a, Shared))
        return jax.vmap(_affine, in_axes=(over,))(w)
    size, bias = w.base.shape[-2], isinstance(w.base, Affine)
    matrix = _float32(w.base.base if bias else w.base)

    def apply(x: jax.Array, base: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return x @ dataclasses.replace(w, base=base)  # type: ignore[type-var]

    # Without the bias, next to which the matrix would be lost: those of qwen2's keys are in the hundreds.
    none = Affine(matrix, jnp.zeros(w.base.shape[-1])) if bias else matrix
    rows = apply(jnp.eye(size + 1, size), none)  # the identity, and a row of zeros for the constant
    constant = apply(jnp.zeros((1, size)), Affine(matrix, _float32(w.base.bias)))[0] if bias else rows[-1]
    return rows[:-1] - rows[-1], constant


def _float32(w: Any) -> jax.Array:
    return _dense(w).astype(jnp.float32)


def _unembed(w: Any, x: jax.Array) -> jax.Array:
    return w.unembed(x) if isinstance(w, Weight) else x @ w.T


def _ragged_dot(w: Any, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return w.ragged_dot(x, group_sizes) if isinstance(w, Weight) else jax.lax.ragged_dot(x, w, group_sizes)


def _is_split(w: Any) -> bool:
    return isinstance(w, Split)
