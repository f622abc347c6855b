"""What a weight does on the way to ``x @ w``: drop features of its input, and multiply by a matrix it does not keep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def dropped(x: Any, key: jax.Array | None, rate: float) -> Any:
    """``x``, an array or a pytree: each number zeroed with probability ``rate``, others scaled to keep the mean.

    Without a key, in evaluation, ``x`` itself."""
    if key is None or rate == 0.0:
        return x

    def one(x: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)

    return jax.tree.map(one, x)


def remade(x: Any, make: Callable[..., jax.Array], *parts: Any) -> jax.Array:
    """``x @ make(*parts)``, [..., in] -> [..., out], where the matrix is made again in the backward pass.

    Kept for it are ``x`` and ``parts`` only. ``make`` gives [in, out] in any dtype; the product is in that of ``x``."""
    return jax.checkpoint(lambda x, *parts: x @ make(*parts).astype(x.dtype))(x, *parts)


def by_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """The Khatri-Rao product by rows: a[n, r], b[n, q] -> [n, r q], each row all products of the two rows' numbers."""
    return (a[:, :, None] * b[:, None, :]).reshape(a.shape[0], -1)


def by_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """The Khatri-Rao product by columns: a[r, n], b[q, n] -> [r q, n]."""
    return (a[:, None, :] * b[None, :, :]).reshape(-1, a.shape[1])
