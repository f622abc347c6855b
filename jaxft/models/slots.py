"""Where a prompt and a prefix enter the decoder.

A `prompt` (n learnt rows in place of token embeddings) stands in front of every document. Where documents share a row,
or a cache is written, its positions are reserved: positions 0..n-1 of each document hold tokens of no meaning, which
`fill` replaces. One document per row needs no such care: `prepend` makes the room, and `forward` cuts it off again. A
`prefix` (n learnt keys and values in each layer) takes the positions before all others and no place in the row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree, verbs

PROMPT, PREFIX = "prompt", "prefix"


def prompt_length(params: tree.Params) -> int:
    """Positions that the prompt takes at the start of every document; 0 without one."""
    return params[PROMPT].shape[-2] if PROMPT in params else 0


def prefix_length(params: tree.Params) -> int:
    """Positions that precede every document: the length of the prefix, 0 without one."""
    return params[PREFIX].shape[2] if PREFIX in params else 0


def tasks(params: tree.Params) -> int:
    """For how many tasks there is a prompt; 1 for one that all share, and without one."""
    return params[PROMPT].shape[0] if PROMPT in params else 1


def computed(params: tree.Params) -> tree.Params:
    """The parameters with each slot as the array it stands for: what an encoder makes, made once."""
    return {**params, **{name: verbs.dense(params[name]) for name in (PROMPT, PREFIX) if name in params}}


def layers(params: tree.Params, dtype: Any) -> tree.Params:
    """The stack of layers, each with its keys and values [2, n, K, H] if there is a prefix."""
    prefix = {PREFIX: verbs.dense(params[PREFIX]).astype(dtype)} if PREFIX in params else {}
    return {**params["layers"], **prefix}


def prepend(
    n: int, tokens_BT: jax.Array, positions_BT: jax.Array, noise_BTD: jax.Array | None, tasks_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The same arrays with n positions before each row: the prompt's."""

    def before(x: jax.Array | None, mode: str = "constant") -> Any:
        return None if x is None else jnp.pad(x, [(0, 0), (n, 0)] + [(0, 0)] * (x.ndim - 2), mode=mode)

    own_Bn = jnp.broadcast_to(jnp.arange(n, dtype=positions_BT.dtype), (positions_BT.shape[0], n))
    positions_BT = jnp.concatenate([own_Bn, positions_BT + n], axis=1)
    return before(tokens_BT), positions_BT, before(noise_BTD), before(tasks_BT, "edge")


def fill(
    prompt: Any, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None, tasks_BT: jax.Array | None
) -> jax.Array:
    """The embeddings with the prompt's rows at positions 0..n-1 of each document.

    ``prompt`` stands for [tasks, n, D]; ``tasks`` int32[B, T] says which task a document belongs to (default: the
    first). Unusual: a product with a one-hot matrix, whose backward pass is a product too and no scatter."""
    rows = verbs.dense(prompt)
    tasks, n, _ = rows.shape
    slot_BT = positions_BT < n
    if segments_BT is not None:
        slot_BT &= segments_BT > 0
    index_BT = positions_BT if tasks_BT is None else positions_BT + n * jnp.clip(tasks_BT, 0, tasks - 1)
    hot_BTM = jax.nn.one_hot(jnp.where(slot_BT, index_BT, -1), tasks * n, dtype=x_BTD.dtype)
    rows_MD = rows.reshape(tasks * n, -1).astype(x_BTD.dtype)
    put_BTD = jnp.einsum("btm,md->btd", hot_BTM, rows_MD, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(slot_BT[..., None], put_BTD, x_BTD)
