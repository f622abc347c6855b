"""Saving and restoring the state of a run: every dtype, hole and key; what is refused; what is kept."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.checkpoint import CheckpointError, state
from jaxft.checkpoint.state import CheckpointConfig, Record
from jaxft.core import tree
from jaxft.core.weight import Split
from jaxft.peft.lora import LoRAWeight

CONFIG = {"peft": {"rank": 2, "targets": ("q", "k")}, "optim": {"lr": 0.1}, "train": {"steps": 10}, "log": {"every": 1}}
RECORD = Record(config=CONFIG, base={"checksum": "abc"}, cursor={"consumed": 3}, progress={"best": 1.5})


def make(key):
    """A state with None holes, a Weight, a typed key, bfloat16, integers and an empty slot."""
    lora = LoRAWeight(
        base=None, a=jax.random.normal(key, (3, 8, 2)), b=jnp.ones((3, 2, 8)), scale=None, rank=None, rate=0.1
    )
    return {
        "step": jnp.int32(7),
        "trainable": {"layers": {"q": lora, "norm": None}, "head": None},
        "opt_state": (jnp.int32(7), {"mu": jax.random.normal(key, (5,), jnp.bfloat16)}),
        "carry": {},
        "key": jax.random.fold_in(key, 5),
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(tree.paths(a), tree.paths(b), strict=True):
        assert x.dtype == y.dtype, path
        x, y = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
        assert np.array_equal(np.asarray(x), np.asarray(y)), path


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip(asynchronous, tmp_path, key):
    want = make(key)
    with state.open_folder(tmp_path, CheckpointConfig(asynchronous=asynchronous)) as manager:
        state.save(manager, 7, want, RECORD)
    with state.open_folder(tmp_path) as manager:
        got, record = state.restore(manager, jax.tree.map(jnp.zeros_like, want) | {"key": key}, RECORD)
    same(got, want)
    assert record.cursor == {"consumed": 3} and record.progress == {"best": 1.5}
    assert jax.random.uniform(got["key"]) == jax.random.uniform(want["key"])


def test_to_other_shardings(tmp_path, key):
    """Saved from one device, restored onto a mesh, and back onto another one."""
    want = make(key)
    with state.open_folder(tmp_path) as manager:
        state.save(manager, 7, want, RECORD)
        manager.wait_until_finished()
        for shape in ((4,), (2,)):
            mesh = jax.make_mesh(shape, ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
            split, whole = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec())
            places = jax.tree.map(lambda a: split if a.shape == (3, 8, 2) else whole, want)  # noqa: B023
            got, _ = state.restore(manager, jax.device_put(want, places), RECORD)
            same(got, want)
            assert [a.sharding for a in jax.tree.leaves(got)] == jax.tree.leaves(places)


def test_the_state_may_be_donated_while_it_is_written(tmp_path, key):
    """Asynchronous saving copies first: steps that overwrite the buffers at once do not reach the file."""
    now = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    advance = jax.jit(lambda s: jax.tree.map(lambda a: a * 2 + 1, s), donate_argnums=0)
    want = []
    with state.open_folder(tmp_path, CheckpointConfig(keep_last=4)) as manager:
        for step in range(4):
            want.append(np.array(now["w"], copy=True))
            state.save(manager, step, now, RECORD)
            now = advance(now)
    with state.open_folder(tmp_path, CheckpointConfig(keep_last=4)) as manager:
        for step in range(4):
            got, _ = state.restore(manager, now, RECORD, step=step)
            assert np.array_equal(got["w"], want[step])


def test_keeps_the_last_and_the_best(tmp_path):
    scores = {1: 5.0, 2: 4.0, 3: 1.0, 4: 3.0, 5: None, 6: 6.0, 7: None}
    config = CheckpointConfig(keep_last=2, keep_best=1)
    for mode, best in (("min", 3), ("max", 6)):
        with state.open_folder(tmp_path / mode, config, mode) as manager:
            for step, score in scores.items():
                state.save(manager, step, {"w": jnp.ones(2)}, RECORD, score)
        with state.open_folder(tmp_path / mode, config, mode) as manager:
            assert set(manager.all_steps()) == {6, 7, best}
            assert manager.latest_step() == 7


def refused(tmp_path, like, record, saved=None, key=None):
    with state.open_folder(tmp_path) as manager:
        state.save(manager, 7, saved if saved is not None else like, RECORD)
        manager.wait_until_finished()
        with pytest.raises(CheckpointError) as error:
            state.restore(manager, like, record)
    return str(error.value)


def test_another_base_is_refused(tmp_path):
    message = refused(tmp_path, {"w": jnp.ones(2)}, Record(config=CONFIG, base={"checksum": "xyz"}))
    assert "another base: checksum was 'abc' and is 'xyz'" in message and "start a new run_dir" in message


def test_another_config_is_refused_by_name_and_what_may_change_is_not(tmp_path):
    free = {**CONFIG, "train": {"steps": 20}, "log": {"every": 5}, "mesh": {"data": 2}}
    other = {**free, "peft": {"rank": 4, "targets": ("q", "k")}, "optim": {"lr": 0.1, "eps": 1e-6}}
    message = refused(tmp_path, {"w": jnp.ones(2)}, Record(config=other, base=RECORD.base))
    assert "peft.rank was 2 and is 4; optim.eps was 'not there' and is 1e-06; expected the config of the run" in message
    with state.open_folder(tmp_path) as manager:
        state.restore(manager, {"w": jnp.ones(2)}, Record(config=free, base=RECORD.base))


def test_other_arrays_are_refused_by_name(tmp_path):
    saved = {"a": jnp.ones((3, 2)), "gone": jnp.ones(2), "c": jnp.ones(2)}
    like = {"a": jnp.ones((3, 4)), "new": jnp.ones(2), "c": jnp.ones(2, jnp.bfloat16)}
    message = refused(tmp_path, like, RECORD, saved)
    assert "without new; with unknown gone; with a float32[3,2] (now float32[3,4]), c float32[2]" in message


def test_nothing_to_restore(tmp_path):
    with state.open_folder(tmp_path) as manager, pytest.raises(CheckpointError, match="no complete checkpoint"):
        state.restore(manager, {"w": jnp.ones(2)}, RECORD)


def test_a_write_cut_short_by_sigkill_is_ignored(tmp_path):
    """A process saves step 1, then dies by SIGKILL while step 2 is being written: step 1 is what is there."""
    code = f"""
        import os, signal, threading, time
        import jax.numpy as jnp
        from pathlib import Path
        from jaxft.checkpoint import state
        from jaxft.checkpoint.state import Record
        folder = Path({str(tmp_path)!r})
        record = Record(config={{}}, base={{}})
        def kill():
            while True:  # the moment the folder of step 2 appears under its temporary name
                if any(name.startswith("2") for name in os.listdir(folder)):
                    os.kill(os.getpid(), signal.SIGKILL)
        with state.open_folder(folder) as manager:
            state.save(manager, 1, {{"w": jnp.full((1 << 22,), 1.0)}}, record)
            manager.wait_until_finished()
            threading.Thread(target=kill, daemon=True).start()
            state.save(manager, 2, {{"w": jnp.full((1 << 22,), 2.0)}}, record)
        print("not killed")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == -9, done.stdout + done.stderr
    left = sorted(os.listdir(tmp_path))
    assert any(name.startswith("2") for name in left)
    with state.open_folder(tmp_path) as manager:
        assert manager.all_steps() == [1]
        got, _ = state.restore(manager, {"w": jnp.zeros(1 << 22)}, Record(config={}, base={}))
        assert float(got["w"].max()) == 1.0
        state.save(manager, 2, {"w": jnp.full((1 << 22,), 3.0)}, RECORD)
        manager.wait_until_finished()
        assert list(manager.all_steps()) == [1, 2]


def test_identity_sees_every_bit_and_no_sharding(key):
    base = {"w": jax.random.normal(key, (8, 4)), "codes": jnp.arange(6, dtype=jnp.uint8), "hole": None}
    want = state.identity(base)
    assert want["parameters"] == 32
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    assert state.identity({**base, "w": jax.device_put(base["w"], NamedSharding(mesh, PartitionSpec("x")))}) == want
    swapped = base["w"].at[0, 0].set(base["w"][0, 1]).at[0, 1].set(base["w"][0, 0])
    one_bit = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(base["w"], jnp.uint32).at[3, 2].add(1), jnp.float32
    )
    others = [
        {**base, "w": swapped},
        {**base, "w": one_bit},
        {**base, "w": base["w"].T},
        {**base, "codes": base["codes"].at[5].set(9)},
        {**base, "w": base["w"].astype(jnp.bfloat16)},
        {"v": base["w"], "codes": base["codes"], "hole": None},
    ]
    assert all(state.identity(other) != want for other in others)


def test_a_stack_of_which_some_layers_are_elsewhere_has_an_identity():
    """Where only some layers of a stack train, the frozen rest has holes."""
    held = {"layers": {"w": Split((None, jnp.ones((2, 3)), None))}, "head": jnp.ones(3)}
    moved = {"layers": {"w": Split((None, None, jnp.ones((2, 3))))}, "head": jnp.ones(3)}
    empty = {"layers": {"w": Split((None, None, None))}, "head": jnp.ones(3)}
    digests = {state.identity(tree)["checksum"] for tree in (held, moved, empty)}
    assert len(digests) == 3
