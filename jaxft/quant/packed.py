"""What every packed weight does alike: all that is not its own way of storing, scaling and multiplying."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxft.core import products, verbs


def nbytes(self: Any) -> int:
    """Bytes of all its arrays."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def dense_dtype(self: Any) -> Any:
    """The dtype it was made from."""
    return jnp.dtype(self.made_from)


def astype(self: Any, dtype: Any) -> jax.Array:
    """The dense matrix in another dtype."""
    return self.dense().astype(dtype)


def multiply(self: Any, x: jax.Array) -> jax.Array:
    """``x @ dense``, the matrix made again in the backward pass."""
    return products.remade(x, verbs.dense, self)


def unembed(self: Any, x: jax.Array) -> jax.Array:
    """``x @ dense.T``, likewise."""
    return products.remade(x, lambda w: w.dense().T, self)


def ragged_dot(self: Any, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The grouped product with the dense matrices, likewise."""

    def product(x: jax.Array, w: Any) -> jax.Array:
        return jax.lax.ragged_dot(x, w.dense().astype(x.dtype), group_sizes)

    return jax.checkpoint(product)(x, self)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in a dtype; rounded to bfloat16 even where the compiler would skip it, as what follows is in float32."""
    return (jax.lax.reduce_precision(x, 8, 7) if dtype == jnp.bfloat16 else x).astype(dtype)


def checked(w: Any, kind: str, kinds: Collection[str]) -> jax.Array:
    """The array to be quantised. Raises ValueError where it has no matrix of floating numbers, is not to be stored as
    one of ``kinds``, or (not while tracing) is not finite."""
    w = jnp.asarray(w)
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"quantize: got {w.dtype}{list(w.shape)}; expected a floating array [..., in, out]")
    if kind not in kinds:
        raise ValueError(f"quantize: got kind {kind!r}; expected one of {', '.join(kinds)}")
    if not isinstance(w, Tracer) and not bool(jnp.all(jnp.isfinite(w))):
        raise ValueError(f"quantize: {list(w.shape)} holds numbers that are not finite; expected a sound weight")
    return w
