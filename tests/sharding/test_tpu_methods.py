"""Every method compiles for a TPU slice: its gradient on a sharded decoder, by the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxft.core import tree
from jaxft.models.decoder import Execution
from jaxft.sharding import rules
from jaxft.testing import model_checks
from tests.peft.test_composes import NAMES, trial
from tests.sharding import steps


@pytest.mark.usefixtures("for_a_chip_elsewhere")
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_compiles(name):
    made = trial(name)
    params, mask = made.fresh
    params = tree.cast(params, jnp.bfloat16)
    mesh = steps.mesh((1, 2, 2), topologies.get_topology_desc("v5e:2x2", "tpu").devices)

    def shape(array, place):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    abstract = jax.tree.map(shape, params, rules.shardings(params, mesh))
    trainable, frozen = tree.partition(abstract, mask)
    rows = {n: np.concatenate([v, v]) for n, v in made.batch.items()}
    batch = {
        n: shape(v, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"))))
        for n, v in rows.items()
    }
    execution = Execution(remat="full", mesh=mesh, backend="xla")
    program = model_checks.gradient.lower(trainable, frozen, batch, execution).compile()
    memory = program.memory_analysis()
    assert 0 < memory.peak_memory_in_bytes < 2**28
    outputs = jax.tree.leaves(program.out_info)
    assert [o.shape for o in outputs] == [leaf.shape for leaf in jax.tree.leaves(trainable)]
