"""The mesh and its border: sizes, what is refused, and batches placed by rows."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxft.sharding import mesh
from jaxft.sharding.mesh import MeshConfig
from tests.sharding import steps


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=-1, fsdp=1), (8, 1, 1)),
        (MeshConfig(tensor=2), (1, 4, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=4, tensor=1), (2, 4, 1)),
    ],
)
def test_sizes(config, sizes):
    made = mesh.create(config)
    assert made.axis_names == mesh.AXES and made.devices.shape == sizes
    assert set(made.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), r"data 3 x fsdp -1 x tensor 1 does not fit 8 devices; their product must be 8"),
        (MeshConfig(fsdp=4), r"data 1 x fsdp 4 x tensor 1 does not fit 8 devices"),
        (MeshConfig(fsdp=16), r"does not fit 8 devices"),
        (MeshConfig(data=-1), r"got data, fsdp; expected sizes of at least 1, at most one of them -1"),
        (MeshConfig(tensor=0), r"got mesh.tensor=0; expected sizes of at least 1"),
        (MeshConfig(data=-2), r"got mesh.data=-2; expected"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        mesh.create(config)


def test_rows_that_do_not_divide_are_refused():
    mesh.check_rows(steps.mesh((2, 2, 2)), 12)
    with pytest.raises(ValueError, match=r"train\.batch=6 rows do not divide over data x fsdp = 4.*multiple of 4"):
        mesh.check_rows(steps.mesh((2, 2, 2)), 6)


def test_each_device_gets_its_rows():
    batch = steps.batch(2, 8, 16, 50)
    on = steps.mesh((2, 2, 2))
    placed = mesh.placer(on)(batch)
    for name, value in batch.items():
        assert placed[name].sharding.spec == P(None, ("data", "fsdp"))
        np.testing.assert_array_equal(placed[name], value)
        for shard in placed[name].addressable_shards:
            assert shard.data.shape == (2, 2, 16)
            np.testing.assert_array_equal(shard.data, value[shard.index])
    single = mesh.placer(None)(batch)
    assert {type(a.sharding) for a in single.values()} == {jax.sharding.SingleDeviceSharding}


def test_starting_a_run_on_one_host_waits_for_nobody():
    mesh.start(MeshConfig())
    assert not jax.distributed.is_initialized()
