"""Moments in the host's memory: the same run to the last bit, through a checkpoint, on one device and on a mesh."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxft.checkpoint import state as disk
from jaxft.checkpoint.state import Record
from jaxft.core import tree
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.training import eight_bit, optim, paged, state, step
from jaxft.training.config import OptimConfig
from jaxft.training.step import Shardings
from tests.sharding import steps
from tests.training import tiny

RECORD = Record({}, {})


def kinds(of):
    return {path: leaf.sharding.memory_kind for path, leaf in tree.arrays(of)}


@pytest.mark.parametrize(("name", "spread"), [("adamw_8bit", False), ("schedule_free", False), ("adamw", True)])
def test_a_run_with_it_is_a_run_without(name, spread, tmp_path, monkeypatch):
    """Two steps, a checkpoint, and two more from it; eight-bit codes and float moments are held on the host."""
    monkeypatch.setattr(paged, "SMALLEST", 40)
    monkeypatch.setattr(eight_bit, "SMALLEST", 40)
    trainable, frozen = tiny.parts(jax.random.key(0), select="embeddings")
    optimizer = optim.make(OptimConfig(name=name, lr=0.01, weight_decay=0.1), trainable, 10)
    key = jax.random.key(1)
    shapes = state.abstract(trainable, optimizer, key)
    alone = SingleDeviceSharding(jax.devices()[0])
    whole = NamedSharding(steps.mesh((2, 2, 2)), PartitionSpec()) if spread else alone
    places = state.shardings(shapes, jax.tree.map(lambda _: whole, trainable), whole)
    if spread:
        up = NamedSharding(whole.mesh, PartitionSpec(None, "fsdp"))
        places = places._replace(
            opt_state=jax.tree.map(lambda p, a: up if a.shape == (3, 8, 2) else p, places.opt_state, shapes.opt_state)
        )

    def run(places, folder):
        rows = NamedSharding(whole.mesh, PartitionSpec(None, ("data", "fsdp"))) if spread else None
        one = step.make_step(
            OBJECTIVES["sft"], SFT(), tiny.score, optimizer, Shardings(places, whole if spread else None, rows)
        )
        now = state.create(trainable, optimizer, key, shardings=places)
        with disk.open_folder(folder) as manager:
            for number in range(4):
                if number == 2:
                    disk.save(manager, 2, now, RECORD)
                now, metrics = one(now, frozen, tiny.micro(tiny.batch(number), 1))
            last = now
            now, _ = disk.restore(manager, now, RECORD)
        for number in range(2, 4):
            now, metrics = one(now, frozen, tiny.micro(tiny.batch(number), 1))
        assert metrics["skipped"] == 0
        for (path, a), (_, b) in zip(tree.arrays(now), tree.arrays(last), strict=True):
            np.testing.assert_array_equal(jax.random.key_data(a) if path == "key" else a,
                                          jax.random.key_data(b) if path == "key" else b, path)  # fmt: skip
        assert kinds(now) == {path: place.memory_kind for path, place in tree.arrays(places)}
        return now

    plain = run(places, tmp_path / "plain")
    ours = run(paged.places(shapes, places), tmp_path / "paged")
    held = {path for path, kind in kinds(ours).items() if kind == paged.HOST}
    assert held and held == {p for p, leaf in tree.arrays(ours) if p.startswith("opt_state") and leaf.size >= 40}
    for (path, a), (_, b) in zip(tree.arrays(ours.opt_state), tree.arrays(plain.opt_state), strict=True):
        np.testing.assert_array_equal(a, b, path)
    one, other = (jax.jit(optimizer.averaged)(s.opt_state, s.trainable) for s in (ours, plain))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_device_without_such_memory_is_refused():
    paged.check(jax.devices()[0], "optim.offload=true")
    device = types.SimpleNamespace(
        device_kind="TPU v2", addressable_memories=lambda: [types.SimpleNamespace(kind="device")]
    )
    with pytest.raises(ValueError, match=r"train\.remat=offload: needs.*pinned_host.*got a TPU v2, which has device\."):
        paged.check(device, "train.remat=offload")  # type: ignore[arg-type]
