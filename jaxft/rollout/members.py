"""Scores of several members of one model at once: adapters trained side by side on one copy of the base.

Arrays of a batch, keys and scores have a leading axis of members, and so have the parameters that differ. Rows of all
members are scored as one batch (`core.many`): the base, attention, norms and the head are computed as for a batch that
is so much larger, and only the adapters are mapped over members. A prompt or prefix is no weight that could be told
apart by rows, so a model with one is mapped over members as a whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import many, tree
from jaxft.core.weight import Slot
from jaxft.models import decoder
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.objectives.terms import Batch
from jaxft.rollout import score as score_
from jaxft.rollout.score import Score
from jaxft.sharding import mesh as mesh_


def make_score(
    config: ModelConfig,
    needs: tuple[str, ...],
    differs: tree.Params,
    *,
    dtype: Any,
    execution: Execution = decoder.DEFAULT,
    neftune_alpha: float = 0.0,
) -> Score:
    """Builds ``score(view, params, batch, keys=None) -> {need: float32[members, B, T]}``.

    ``differs``: a tree of booleans, True for the arrays of ``params`` that are [members, ...]. ``batch`` arrays are
    [members, B, T]; ``keys``: one a member. Each member is scored as `score.make_score` scores it alone."""
    shards = mesh_.row_shards(execution.mesh)
    # Not every attention kernel can be mapped: cuDNN's cannot where rows are packed.
    mapped = dataclasses.replace(execution, backend="xla" if execution.backend == "auto" else execution.backend)
    alone = score_.make_score(config, needs, dtype=dtype, execution=mapped, neftune_alpha=neftune_alpha)
    forward = score_.make_forward(config, needs, dtype=dtype, execution=execution)

    def score(view: str, params: tree.Params, batch: Batch, keys: jax.Array | None = None) -> dict[str, jax.Array]:
        each, common = tree.partition(params, differs)
        if any(isinstance(part, Slot) for part in params.values()):
            return jax.vmap(lambda e, b, k: alone(view, tree.combine(e, common), b, k))(each, batch, keys)
        count = batch["tokens"].shape[0]
        noise = None if keys is None else jax.vmap(lambda b, k: score_.noise(config, neftune_alpha, b, k))(batch, keys)
        if keys is not None:
            each = tree.combine(jax.vmap(lambda e, k: dropout(tree.combine(e, common), k))(each, keys), each)
        rows = jax.tree.map(lambda a: folded(a, shards), (batch, noise))
        out = forward(many.wrap(each, common, count, shards), *rows)
        return jax.tree.map(lambda a: unfolded(a, count, shards), out)

    return score


def dropout(params: tree.Params, key: jax.Array) -> tree.Params:
    """The dropout keys of one member, and ``None`` for all else."""
    keyed = tree.dropout_keys(params, score_.dropout_key(key))
    is_leaf = lambda a: a is None or tree.is_split(a)  # noqa: E731
    return jax.tree.map(lambda old, new: new if old is None else None, params, keyed, is_leaf=is_leaf)


def folded(a: jax.Array, shards: int) -> jax.Array:
    """[members, B, ...] -> [rows, ...], the rows of each shard of the mesh together, member after member."""
    members, rows = a.shape[:2]
    return jnp.moveaxis(a.reshape(members, shards, rows // shards, *a.shape[2:]), 1, 0).reshape(-1, *a.shape[2:])


def unfolded(a: jax.Array, members: int, shards: int) -> jax.Array:
    """The inverse of `folded`."""
    parts = jnp.moveaxis(a.reshape(shards, members, -1, *a.shape[1:]), 1, 0)
    return parts.reshape(members, -1, *a.shape[1:])
