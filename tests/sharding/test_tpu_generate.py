"""Generation compiled for a TPU slice that is not here: it fits, its rows' pages stay where they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxft.models import cache as cache_
from jaxft.models import families, init
from jaxft.models.decoder import Execution
from jaxft.rollout import decode
from jaxft.rollout.decode import Laid, Plan, Turn
from jaxft.rollout.generate import GenerateConfig
from jaxft.sharding import rules
from tests.sharding import planned, steps
from tests.sharding.test_tpu import GIB, LLAMA_1B, exchanged

ROWS, PAGE, WIDTH, CHUNK = 64, 64, 6, 16
SETTINGS = GenerateConfig(256, 0.8, top_p=0.9, repetition_penalty=1.1)


def shapes(tree_: Any, places: Any = None) -> Any:
    if places is None:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree_)
    return jax.tree.map(lambda a, p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=p), tree_, places)


def lowered(which: str) -> Any:
    """One of the device's programs, 64 rows of a 1B model over eight chips, not compiled."""
    mesh = steps.mesh((2, 2, 2), topologies.get_topology_desc("v5e:2x4", "tpu").devices)
    config, names = families.read(LLAMA_1B)
    made = jax.eval_shape(lambda key: init.random(config, names, key, jnp.bfloat16), jax.random.key(0))
    params = shapes(made, rules.shardings(made, mesh))
    how = Execution(mesh=mesh, gather=rules.gather(mesh))
    plan = Plan(config, how, SETTINGS.sampling, ROWS, 4, PAGE, WIDTH, ROWS // 4 * (WIDTH + 1), False)
    table = jnp.zeros((ROWS, WIDTH), jnp.int32)
    cache = jax.eval_shape(lambda: cache_.create(config, plan.pages, PAGE, table, jnp.bfloat16, shards=4))
    spec = jax.sharding.PartitionSpec(None, ("data", "fsdp"), None, "tensor")
    place, whole = (jax.sharding.NamedSharding(mesh, s) for s in (spec, jax.sharding.PartitionSpec()))
    cache = shapes(cache, jax.tree.map(lambda a: place if a.ndim == 6 else whole, cache))
    ints = np.zeros(ROWS, np.int32)
    if which == "read":
        cache = cache_.Cache(cache.k, cache.v, cache.table, fresh=True)
        rows = np.zeros((ROWS, 128), np.int32)
        return decode.read.lower(plan, params, cache, shapes(Laid(rows, rows, rows, ints)))
    turn = Turn(np.zeros(ROWS, bool), ints, ints, ints, ints, np.zeros((ROWS, 2), np.uint32), ints)
    occurred = jax.eval_shape(lambda: decode.nothing_occurred(plan))
    about = shapes((turn, np.zeros((2, ROWS), np.int32), SETTINGS.knobs, np.zeros(2, np.int32)))
    return decode.decode.lower(plan, CHUNK, params, cache, *about, shapes(occurred))


@pytest.mark.parametrize(("which", "limit"), [("decode", 2.0), ("read", 2.5)])
def test_it_fits(which, limit, tmp_path):
    plan = planned.plan(lowered, which, folder=tmp_path)
    print(f"{which}: arguments {plan.arguments / GIB:.2f}, all {plan.chip / GIB:.2f} GiB")
    assert plan.chip / GIB < limit
    # a page of keys is [..., heads, PAGE, H]: none travels, though weights do
    assert exchanged(plan.program)
    assert not [shape for _, shape in exchanged(plan.program) if shape[-2:] == (PAGE, 64) and len(shape) > 3]
