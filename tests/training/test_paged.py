"""Moments in the host's memory: the same run to the last bit, through a checkpoint, on one device and on a mesh."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxft.checkpoint import state as disk
from jaxft.checkpoint.state import Record
from jaxft.core import tree
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.training import eight_bit, optim, paged, state, step, sweep
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
    settings = OptimConfig(name=name, lr=0.01, weight_decay=0.1, clip_norm=0.1, groups={"/b$": 4.0})
    optimizer = optim.make(settings, trainable, 10)
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

    def run(settings, places, folder):
        optimizer = optim.make(settings, trainable, 10)
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

    plain = run(settings, places, tmp_path / "plain")
    away = places._replace(opt_state=paged.places(shapes.opt_state, places.opt_state))
    ours = run(dataclasses.replace(settings, offload=True), away, tmp_path / "paged")
    held = {path for path, kind in kinds(ours).items() if kind == paged.HOST}
    assert held and held == {p for p, leaf in tree.arrays(ours) if p.startswith("opt_state") and leaf.size >= 40}
    rounding = 2e-6 if name == "schedule_free" else 0.0  # its sums are contracted in another order
    for (path, a), (_, b) in zip(tree.arrays(ours.opt_state), tree.arrays(plain.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=rounding, atol=0, err_msg=path)
    one, other = (jax.jit(optimizer.averaged)(s.opt_state, s.trainable) for s in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=10 * rounding, atol=0), one, other)


def test_members_of_a_sweep_are_paged_together(monkeypatch):
    """And a step that is not finite leaves the moments of its own member alone."""
    monkeypatch.setattr(paged, "SMALLEST", 40)
    trainable, _ = tiny.parts(jax.random.key(0), select="embeddings")
    both = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), trainable)
    fine = jnp.array([True, False])

    def run(offload):
        settings = OptimConfig(lr=0.01, offload=offload)
        optimizer = sweep.make_optimizer(settings, trainable, [0.01, 0.02], 10)
        held = jax.tree.map(lambda a: a + jnp.ones_like(a), optimizer.init(both))
        places = jax.tree.map(lambda a: a.sharding, held)
        places = paged.places(held, places) if offload else places
        step = jnp.full(2, 3, jnp.int32)
        update = jax.jit(optimizer.update, out_shardings=(None, places))
        return update(both, jax.device_put(held, places), both, step, fine)

    (changed, after), (expected, plain) = run(True), run(False)
    assert {"pinned_host", "device"} == set(kinds(after).values())
    jax.tree.map(np.testing.assert_array_equal, (changed, after), (expected, plain))
    assert all(np.array_equal(a[1], np.ones_like(a[1])) for a in jax.tree.leaves(after))
    assert not any(np.array_equal(a[0], np.ones_like(a[0])) for a in jax.tree.leaves(after))


def test_a_device_without_such_memory_is_refused():
    paged.check(jax.devices()[0], "optim.offload=true")
    device = types.SimpleNamespace(
        device_kind="TPU v2", addressable_memories=lambda: [types.SimpleNamespace(kind="device")]
    )
    with pytest.raises(ValueError, match=r"train\.remat=offload: needs.*pinned_host.*got a TPU v2, which has device\."):
        paged.check(device, "train.remat=offload")  # type: ignore[arg-type]
