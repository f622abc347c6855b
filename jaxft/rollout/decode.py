"""What generation runs on the device: prompts into the cache, pages copied, tokens decoded in every row."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.core import many, tree
from jaxft.models import cache as cache_
from jaxft.models import decoder, heads, slots
from jaxft.models.cache import Cache
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.rollout import sample
from jaxft.rollout.sample import Drawn, Knobs, Sampling

Occurred = tuple[jax.Array, jax.Array]
"""See `sample.penalised`."""


@dataclass(frozen=True)
class Plan:
    """What is static in a generation."""

    config: ModelConfig
    execution: Execution
    sampling: Sampling
    rows: int
    """Decoded together, over all shards."""
    shards: int
    page: int
    width: int
    """Pages of a row, at most."""
    pages: int
    """Of a shard."""
    stacked: bool
    """Rows have an adapter each."""


class Turn(NamedTuple):
    """What a chunk reads of its rows, int32[B] or uint32[B, 2]."""

    first_B: Any
    """bool: the row begins; otherwise its token and what is left are those that the chunk before it ended with."""
    token_B: Any
    position_B: Any
    left_B: Any
    """Tokens still to be made; 0: nobody is here."""
    count_B: Any
    """Tokens made before."""
    key_B: Any
    adapter_B: Any


class Laid(NamedTuple):
    """Prompts padded on the right, int32[R, T], and the adapter of each, int32[R]."""

    tokens_RT: Any
    segments_RT: Any
    tasks_RT: Any
    adapters_R: Any


def page_of() -> int:
    """Tokens of a page: what the kernel reads at once, and on a CPU fewer."""
    return 16 if jax.default_backend() == "cpu" else 64


def uniform(params: tree.Params) -> tree.Params:
    """The model in the dtype of its embedding: what was trained in place is float32, whatever the rest."""
    return tree.cast(params, params["embed"]["tokens"].dtype)


@functools.partial(jax.jit, static_argnums=0)
def create(plan: Plan, params: tree.Params) -> Cache:
    """The pages of a plan, on the devices of its mesh."""
    apart = decoder.unrolls(plan.config, params, plan.execution)
    table = jnp.zeros((plan.rows, plan.width), jnp.int32)
    how = {"shards": plan.shards, "apart": apart}
    made = cache_.create(plan.config, plan.pages, plan.page, table, params["embed"]["tokens"].dtype, **how)
    return _placed(plan, made)


def _placed(plan: Plan, cache: Cache) -> Cache:
    mesh = plan.execution.mesh
    if mesh is None or mesh.size == 1:
        return cache
    heads_axis = "tensor" if plan.config.num_kv_heads % mesh.shape["tensor"] == 0 else None
    spec = jax.sharding.PartitionSpec(None, ("data", "fsdp") if plan.shards > 1 else None, None, heads_axis)
    place = lambda a: jax.lax.with_sharding_constraint(a, jax.sharding.NamedSharding(mesh, spec))  # noqa: E731
    return Cache(tuple(map(place, cache.k)), tuple(map(place, cache.v)), cache.table, cache.fresh)


def _everywhere(plan: Plan, tree_: Any) -> Any:
    """On every device of the mesh, so that any host can read it."""
    mesh = plan.execution.mesh
    if mesh is None or mesh.size == 1:
        return tree_
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, whole), tree_)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(plan: Plan, params: tree.Params, cache: Cache, laid: Laid) -> Cache:
    """Adds prompts to pages that hold nothing."""
    params = uniform(slots.computed(params))
    if plan.stacked:
        params = many.for_rows(params, laid.adapters_R)
    positions_RT = jnp.broadcast_to(jnp.arange(laid.tokens_RT.shape[1], dtype=jnp.int32), laid.tokens_RT.shape)
    _, held, _ = decoder.forward(
        plan.config, params, laid.tokens_RT, positions_RT, laid.segments_RT, cache,
        execution=plan.execution, tasks_BT=laid.tasks_RT,
    )  # fmt: skip
    return _placed(plan, held)  # type: ignore[arg-type]


@functools.partial(jax.jit, donate_argnums=0)
def copy(cache: Cache, source: Any, to: Any) -> Cache:
    return cache_.copy_pages(cache, source, to)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 8))
def decode(
    plan: Plan, chunk: int, params: tree.Params, cache: Cache, turn: Turn, last_2B: jax.Array, knobs: Knobs,
    end_E: jax.Array,
    occurred: Occurred | None,
) -> tuple[Drawn, jax.Array, Cache, Any]:  # fmt: skip
    """``chunk`` tokens in each row, [chunk, B]; a row that ended goes on without a trace.

    ``last`` int32[2, B]: the newest token of each row and how many are left, as the chunk before returned them."""
    params = uniform(slots.computed(params))
    if plan.stacked:
        params = many.for_rows(params, turn.adapter_B)
    head, keys_B = heads.head_of(plan.config, params), jax.random.wrap_key_data(turn.key_B, impl="threefry2x32")

    def one(carry: Any, step: jax.Array) -> Any:
        token_B, left_B, occurred, cache = carry
        here_B, position_B = left_B > 0, turn.position_B + step
        hidden_B1D, cache, _ = decoder.forward(
            plan.config, params, token_B[:, None], position_B[:, None], here_B.astype(jnp.int32)[:, None], cache,
            execution=plan.execution,
        )  # fmt: skip
        logits_BV = heads.logits(plan.config, head, hidden_B1D[:, 0])
        keys = jax.vmap(jax.random.fold_in)(keys_B, turn.count_B + step)
        drawn = sample.draw(plan.sampling, knobs, keys, logits_BV, occurred)
        ended_B = jnp.any(drawn.token_B[:, None] == end_E[None], -1)
        left_B = jnp.where(ended_B, 0, jnp.maximum(left_B - 1, 0))
        if occurred is not None:
            B = token_B.shape[0]
            occurred = occurred[0], occurred[1].at[jnp.arange(B), drawn.token_B].add(here_B.astype(jnp.int32))
        return (drawn.token_B, left_B, occurred, cache), drawn

    newest_B, left_B = jnp.where(turn.first_B, jnp.stack([turn.token_B, turn.left_B]), last_2B)
    steps = jnp.arange(chunk, dtype=jnp.int32)
    (newest_B, left_B, occurred, cache), made = jax.lax.scan(one, (newest_B, left_B, occurred, cache), steps)
    last_2B = _everywhere(plan, jnp.stack([newest_B, left_B]))
    return _everywhere(plan, made), last_2B, _placed(plan, cache), occurred


def nothing_occurred(plan: Plan) -> Occurred:
    shape = (plan.rows, plan.config.vocab_size)
    return jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)


@functools.partial(jax.jit, donate_argnums=0)
def forgotten(occurred: Occurred, row: Any, prompt: Any) -> Occurred:
    return occurred[0].at[row].set(prompt), occurred[1].at[row].set(0)
