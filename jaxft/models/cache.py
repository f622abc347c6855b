"""The key-value cache: pages of a few tokens, lent to rows as they grow.

A row is one sequence: its token at position p lies in page ``table[row, p // page]`` at place ``p % page``. Rows differ
in length and none is padded to another's; rows that begin alike can hold the same pages. Keys and values of a prefix
lie before the tokens, as the first positions.

Layout: k, v [layers, shards, pages, K, page, H], one array of all layers or an array for each. On a mesh each shard of
the rows has pages of its own, which its rows' tables number from 0, so that no page crosses devices.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Pages, and which of them each row has."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    table: jax.Array
    """int32[B, M]: the pages of each row, in order."""
    fresh: bool = field(default=False, metadata={"static": True})
    """The rows hold nothing yet: tokens see each other alone, as without a cache."""

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k[0].shape[4]

    @property
    def shards(self) -> int:
        return self.k[0].shape[1]


def create(
    config: ModelConfig, pages: int, page: int, table: jax.Array, dtype: Any, *, shards: int = 1, apart: bool = False
) -> Cache:
    """Empty pages; ``pages`` of them in each shard, of ``page`` tokens. ``apart``: an array for each layer, which a
    model of unrolled layers reads and writes without touching the others."""
    arrays, layers = (config.num_layers, 1) if apart else (1, config.num_layers)
    shape = (layers, shards, pages, config.num_kv_heads, page, config.head_dim)
    made = [tuple(jnp.zeros(shape, dtype) for _ in range(arrays)) for _ in "kv"]
    return Cache(made[0], made[1], table)


def of_layer(arrays: tuple[jax.Array, ...], layer: Any) -> tuple[jax.Array, Any]:
    """The array that holds a layer, and which of its layers it is there."""
    return (arrays[0], layer) if len(arrays) == 1 else (arrays[layer], 0)


def with_layer(arrays: tuple[jax.Array, ...], layer: Any, new: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays with a new one in the place of that which holds a layer."""
    return (new,) if len(arrays) == 1 else tuple(new if i == layer else a for i, a in enumerate(arrays))


def write(
    cache: Cache, layer: Any, positions_BT: jax.Array, keep_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> Cache:
    """Writes keys and values of one layer at these positions; not where ``keep`` is False."""
    within_BT = jnp.clip(positions_BT // cache.page, 0, cache.table.shape[1] - 1)
    pages = cache.k[0].shape[2]
    page_BT = jnp.where(keep_BT, jnp.take_along_axis(cache.table, within_BT, axis=1), pages)  # beyond the last: nowhere
    place_BT = positions_BT % cache.page

    def put(arrays: tuple[jax.Array, ...], x_BTKH: jax.Array) -> tuple[jax.Array, ...]:
        held, at = of_layer(arrays, layer)

        def one(pool: jax.Array, page_BT: jax.Array, place_BT: jax.Array, x_BTKH: jax.Array) -> jax.Array:
            return pool.at[at, page_BT, :, place_BT].set(x_BTKH.astype(pool.dtype), mode="drop")

        return with_layer(arrays, layer, _by_shard(one, cache.shards, held, page_BT, place_BT, x_BTKH))

    return dataclasses.replace(cache, k=put(cache.k, k_BTKH), v=put(cache.v, v_BTKH))


def _by_shard(fn: Callable, shards: int, pool: jax.Array, *of_rows: jax.Array) -> jax.Array:
    """``fn(pool of a shard, its rows)`` for every shard: no page or row leaves its own."""
    if shards == 1:
        return fn(pool[:, 0], *of_rows)[:, None]
    parts = [a.reshape(shards, a.shape[0] // shards, *a.shape[1:]) for a in of_rows]
    return jax.vmap(fn, in_axes=(1, *(0 for _ in parts)), out_axes=1)(pool, *parts)


def read(cache: Cache, layer: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, M * page, K, H] of one layer, in the order of positions: a copy."""

    def get(arrays: tuple[jax.Array, ...]) -> jax.Array:
        held, at = of_layer(arrays, layer)

        def one(pool: jax.Array, table_BM: jax.Array) -> jax.Array:
            return pool[at, table_BM]  # [B, M, K, page, H]

        if cache.shards == 1:
            found = one(held[:, 0], cache.table)
        else:
            tables = cache.table.reshape(cache.shards, -1, cache.table.shape[1])
            found = jax.vmap(one, in_axes=(1, 0))(held, tables)
            found = found.reshape(-1, *found.shape[2:])
        B, M, K, page, H = found.shape
        return jnp.moveaxis(found, 2, 3).reshape(B, M * page, K, H)

    return get(cache.k), get(cache.v)


def copy_pages(cache: Cache, source: jax.Array, to: jax.Array) -> Cache:
    """Copies pages ``source`` int32[shards, n] to pages ``to``, of all layers; one beyond the last is left out."""

    def one(pool: jax.Array, source: jax.Array, to: jax.Array) -> jax.Array:
        return pool.at[:, to].set(pool[:, source], mode="drop")

    def put(held: jax.Array) -> jax.Array:
        return jax.vmap(one, in_axes=(1, 0, 0), out_axes=1)(held, source, to)

    return dataclasses.replace(cache, k=tuple(map(put, cache.k)), v=tuple(map(put, cache.v)))
