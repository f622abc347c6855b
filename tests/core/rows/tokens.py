"""Rows of embeddings and heads of which some tokens train."""

import jax
import jax.numpy as jnp

from jaxft.core.weight import Weight
from jaxft.peft.trainable_tokens import TokensWeight
from tests.core.rows.build import LAYERS, Row, matrix


def tokens(key: jax.Array, dtype: jnp.dtype, lookup: bool = True, tied: bool | None = None) -> Weight:
    base = matrix(key, dtype)
    ids = jnp.broadcast_to(jnp.array([1, 4], jnp.int32), (LAYERS, 2))
    rows = base[:, jnp.array([1, 4])] if lookup else base[..., jnp.array([1, 4])].swapaxes(1, 2)
    return TokensWeight(base, rows.astype(jnp.float32), ids, lookup, tied)


ROWS: dict[str, Row] = {
    "tokens": Row(tokens, embedding=True, experts=False),
    "tokens, tied head": Row(lambda k, d: tokens(k, d, tied=True), embedding=True, experts=False),
    "tokens of a head": Row(lambda k, d: tokens(k, d, lookup=False), experts=False),
}
