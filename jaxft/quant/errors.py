r"""What few bits cost, layer by layer: in the products on given data, and where an adapter is merged into them.

All errors are relative, in the Frobenius norm: :math:`\|y' - y\| / \|y\|`. Those of several together are
:math:`\sqrt{\sum \|y' - y\|^2} / \sqrt{\sum \|y\|^2}`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.core.weight import Affine, Shared, Weight, is_packed, parameter, weight

Batch = Mapping[str, Any]


class Product(NamedTuple):
    """The error of one layer's ``x @ w`` on data that the unquantised model made."""

    module: str
    squared: float
    """Sum of (x @ packed - x @ dense)^2 over all positions and features."""
    size: float
    """Sum of (x @ dense)^2."""

    @property
    def error(self) -> float:
        return math.sqrt(self.squared / self.size) if self.size else 0.0


class Merged(NamedTuple):
    """What becomes of one layer's ``packed + update`` once it is one matrix; sums of squares."""

    module: str
    size: float
    """Of the sum itself, in float32."""
    update: float
    """Of what the adapter adds."""
    rounding: float
    """Of what rounding the sum to the dtype it is written in changes."""
    packing: float | None
    """Of what storing that as the base is stored changes; None for a base whose packing cannot be repeated."""


def total(rows: Iterable[Any], field: str) -> float:
    """The relative error of all `Product` or `Merged` rows together."""
    rows = list(rows)
    size = sum(row.size for row in rows)
    return math.sqrt(sum(getattr(row, field) for row in rows) / size) if size else 0.0


@weight
class Compared(Weight):
    """``x @ base`` for x [B, T, in]; the gradient of ``sums`` float32[*stack, 2] is (the squared difference of ``x @
    other``, the square of ``x @ base``), summed over the positions of ``mask`` bool[B, T]. As in `core.tap`."""

    base: Any = parameter()
    other: Any = parameter()
    sums: jax.Array
    mask: Shared
    adapter: ClassVar[bool] = False

    def __rmatmul__(self, x):
        y = x @ self.base
        counted = self.mask.value[..., None]
        exact = jnp.where(counted, y.astype(jnp.float32), 0.0)
        off = jnp.where(counted, (x @ self.other).astype(jnp.float32), 0.0) - exact
        found = jnp.stack([jnp.sum(jnp.square(off)), jnp.sum(jnp.square(exact))])
        return _noted(y, self.sums, jax.lax.stop_gradient(found))


@jax.custom_vjp
def _noted(y: jax.Array, sums: jax.Array, found: jax.Array) -> jax.Array:
    return y


def _forward(y: jax.Array, sums: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, found


def _backward(found: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return g, found, jnp.zeros_like(found)


_noted.defvjp(_forward, _backward)


def products(
    dense: tree.Params,
    packed: tree.Params,
    names: Names,
    batches: Iterable[Batch],
    forward: Callable[[tree.Params, Batch], jax.Array],
) -> list[Product]:
    """The error of every packed layer's product, in the order in which they are computed.

    ``dense``: the same model before it was packed, whose activations are multiplied. ``batches`` have tokens
    int32[B, T] and may have segments; ``forward(params, batch)`` is any function of the model's output. Raises
    ValueError where nothing is packed, or there is no batch."""
    found = [name for name in names if name.kind != "norm" and _packed_of(tree.get(packed, name.path)) is not None]
    if not found:
        raise ValueError("errors.products: nothing in this model is stored in few bits; expected quant.method=nf4, ...")

    @jax.jit
    def sums(dense: tree.Params, packed: tree.Params, batch: Batch) -> dict[str, jax.Array]:
        ones = jnp.ones(batch["tokens"].shape, bool)
        mask = Shared(batch["segments"] > 0 if "segments" in batch else ones)

        def value(zeros: dict[str, jax.Array]) -> jax.Array:
            compared = dense
            for name in found:
                other = _packed_of(tree.get(packed, name.path))
                put = lambda w, other=other, at=zeros[name.path]: Compared(w, other, sums=at, mask=mask)  # noqa: E731
                compared = tree.wrap(compared, name.path, put)
            return jnp.sum(forward(compared, batch).astype(jnp.float32))

        return jax.grad(value)({n.path: jnp.zeros((*tree.get(packed, n.path).shape[:-2], 2)) for n in found})

    whole: Any = None
    for batch in batches:
        more = sums(dense, packed, {key: jnp.asarray(value) for key, value in batch.items()})
        whole = more if whole is None else jax.tree.map(jnp.add, whole, more)
    if whole is None:
        raise ValueError("errors.products: got no batch; expected data to multiply")
    modules = {name.path: name.modules(tree.num_layers(packed)) for name in found}
    held = {path: jax.device_get(value).reshape(-1, 2) for path, value in whole.items()}
    layers = max(map(len, modules.values()))
    return [
        Product(modules[n.path][i], *map(float, held[n.path][i]))
        for i in range(layers)
        for n in found
        if i < len(modules[n.path])
    ]


def merging(params: tree.Params, names: Names, dtype: Any = None) -> Iterator[Merged]:
    """What merging changes in every layer of a packed weight with an adapter on it: see `Merged`.

    ``dtype``: of the merged weights; default: as of `tree.merge`. A layer is made at a time."""
    layers = tree.num_layers(params)
    for name in names:
        w = tree.get(params, name.path)
        if name.kind == "norm" or not tree.adapters({"w": w}) or _packed_of(w) is None:
            continue
        for i, module in enumerate(name.modules(layers)):
            one = tree.stack_layers(w)[i] if name.stacked else w
            yield _merged(module, one, dtype)


@jax.jit
def _sums(exact: jax.Array, base: jax.Array, written: jax.Array) -> list[jax.Array]:
    return [jnp.sum(jnp.square(a)) for a in (exact, exact - base, written.astype(jnp.float32) - exact)]


def _merged(module: str, w: Any, dtype: Any) -> Merged:
    packed = _packed_of(w)
    base = packed.dense()
    exact = matrix(tree.merge({"w": jax.tree.map(_in_float32, w, is_leaf=is_packed)})["w"])
    written = exact.astype(base.dtype if dtype is None else dtype)
    size, update, rounding = map(float, _sums(exact, base.astype(jnp.float32), written))
    again = None
    if hasattr(packed, "repacked"):
        again = float(jnp.sum(jnp.square(packed.repacked(written).dense().astype(jnp.float32) - exact)))
    return Merged(module, size, update, rounding, again)


def repacked(merged: tree.Params, params: tree.Params, names: Names) -> tree.Params:
    """``merged`` with what was packed in ``params`` packed again in the same way.

    Raises ValueError naming a weight whose packing cannot be repeated."""
    for name in names:
        packed = None if name.kind == "norm" else _packed_of(tree.get(params, name.path))
        if packed is None:
            continue
        if not hasattr(packed, "repacked"):
            raise ValueError(
                f"{name.path}: {packed!r} is made by another procedure than rounding; expected nf4, fp4, int8 or fp8: "
                "merge into a dense model, and quantise that"
            )
        merged = tree.wrap(merged, name.path, lambda w, p=packed: w if is_packed(w) else p.repacked(w))
    return merged


def matrix(w: Any) -> jax.Array:
    """The matrix of a plain weight, without its bias."""
    return w.base if isinstance(w, Affine) else w


def _packed_of(w: Any) -> Any:
    """The weight in few bits that a weight is, or is around; None if there is none."""
    while isinstance(w, Weight) and not is_packed(w):
        w = getattr(w, "base", None)
    return w if isinstance(w, Weight) else None


def _in_float32(w: Any) -> Any:
    return w.dense().astype(jnp.float32) if is_packed(w) else w
