"""The jitted step: accumulation, packing, skipping, sharding, and what it compiles to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.core import tree
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.objectives.terms import Mean, Objective
from jaxft.training import optim, state, step
from jaxft.training.optim import OptimConfig
from tests.training import tiny

SFT_ROW = OBJECTIVES["sft"]


def setup(key, config=OptimConfig(lr=0.01), rate=0.0, select=None, score=tiny.score, **more):  # noqa: B008 (frozen)
    trainable, frozen = tiny.parts(key, rate, select)
    optimizer = optim.make(config, trainable, 10)
    begin = state.create(trainable, optimizer, key)
    return step.make_step(SFT_ROW, SFT(), score, optimizer, **more), begin, frozen


def flat(t):
    return {path: np.asarray(leaf) for path, leaf in tree.paths(t)}


def close(got, want, rtol=1e-5, atol=1e-6):
    got, want = flat(got), flat(want)
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_equals_one_large_batch(accumulate, key):
    """1 x 8, 4 x 2 and 8 x 1 rows with ragged token counts: the same loss, gradient norm and parameters."""
    config = OptimConfig(name="sgd", lr=0.1, clip_norm=None)  # linear in the gradient, unlike Adam's first step
    run, whole, frozen = setup(key, config)
    _, split, _ = setup(key, config)
    for seed in range(3):
        batch = tiny.batch(seed)
        assert len({int(row.sum()) for row in batch["loss_mask"]}) > 2  # ragged
        whole, want = run(whole, frozen, tiny.micro(batch, 1))
        split, got = run(split, frozen, tiny.micro(batch, accumulate))
        close(got, want, rtol=1e-6, atol=1e-6)
    close(split.trainable, whole.trainable, rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_token_mean(key):
    run, begin, frozen = setup(key)
    batch = tiny.batch(0)
    logp = tiny.score("policy", tree.combine(begin.trainable, frozen), batch)["logp"]
    _, metrics = run(begin, frozen, tiny.micro(batch, 4))
    want = -np.asarray(logp)[batch["loss_mask"]].mean()
    assert float(metrics["loss"]) == pytest.approx(want, rel=1e-6)
    assert float(metrics["nll"]) == pytest.approx(want, rel=1e-6)
    assert int(metrics["tokens"]) == int((batch["segments"] > 0).sum())
    assert sorted(metrics) == [
        "grad_norm", "learning_rate", "loss", "mean_token_accuracy", "nll", "skipped", "tokens",
    ]  # fmt: skip


def test_packed_equals_unpacked(key):
    """Two documents in one row with segments, or in two rows: the same step."""
    batch = tiny.batch(1, rows=2, length=12)
    packed = jax.tree.map(lambda a: a.reshape(1, -1), batch)
    packed["segments"] = np.where(packed["segments"] > 0, np.repeat([[1, 2]], 12, axis=1).reshape(1, -1), 0)
    run, begin, frozen = setup(key)
    _, again, _ = setup(key)
    rows, want = run(begin, frozen, tiny.micro(batch, 1))
    row, got = run(again, frozen, tiny.micro(packed, 1))
    close(got, want)
    close(row.trainable, rows.trainable)


def test_one_compile_for_a_run(key):
    run, now, frozen = setup(key)
    with tiny.compiles() as count:
        for seed in range(4):
            now, _ = run(now, frozen, tiny.micro(tiny.batch(seed), 2))
    assert count == ["jit(step)"] and run._cache_size() == 1
    assert int(now.step) == 4


def test_only_the_trainable_part_has_gradients_and_moments(key):
    """The literal tree of what trains, and moments for nothing else."""
    _, begin, _ = setup(key)
    assert {p: leaf.shape for p, leaf in flat(begin.trainable).items()} == {
        "layers/mlp/up/a": (3, 8, 2),
        "layers/mlp/up/b": (3, 2, 8),
    }
    moments = [leaf.shape for path, leaf in tree.paths(begin.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted([(3, 8, 2), (3, 2, 8)] * 2)
    assert begin.start is None


def test_the_frozen_part_is_an_argument_not_a_constant_and_not_donated(key):
    run, begin, frozen = setup(key)
    (call,) = jax.make_jaxpr(run)(begin, frozen, tiny.micro(tiny.batch(0), 2)).eqns
    assert sum(np.size(c) for c in call.params["jaxpr"].consts) < 10
    run(begin, frozen, tiny.micro(tiny.batch(0), 2))
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(begin.trainable))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_a_step_that_is_not_finite_is_skipped(what, name, key):
    """Parameters and moments stay bit for bit; the counter moves; the next good step is that of an untouched state."""

    def score(view, params, batch, key=None):
        out = tiny.score(view, params, batch, key)
        bad = batch["tokens"][0, 0] == 7
        if what == "loss":
            return out | {"logp": jnp.where(bad, jnp.nan, out["logp"])}
        # a finite value with an infinite slope: sqrt at 0
        slope = jnp.sqrt(jnp.where(bad, params["layers"]["mlp"]["up"].a.sum() * 0.0, 1.0))
        return out | {"logp": out["logp"] + slope}

    run, now, frozen = setup(key, OptimConfig(name=name, lr=0.01), score=score)
    batch = tiny.micro(tiny.batch(0), 2)
    batch["tokens"][:, 0, 0] = 1
    now, metrics = run(now, frozen, batch)
    assert int(metrics["skipped"]) == 0
    before = flat((now.trainable, now.opt_state))
    poisoned = {**batch, "tokens": batch["tokens"].copy()}
    poisoned["tokens"][1, 0, 0] = 7
    now, metrics = run(now, frozen, poisoned)
    assert int(metrics["skipped"]) == 1 and int(now.step) == 2
    assert bool(jnp.isfinite(metrics["loss"])) == (what == "gradient")
    after = flat((now.trainable, now.opt_state))
    assert all(np.array_equal(after[path], before[path]) for path in before)
    now, metrics = run(now, frozen, batch)
    assert int(metrics["skipped"]) == 0 and run._cache_size() == 1
    assert not np.array_equal(flat(now.trainable)["layers/mlp/up/a"], before["0/layers/mlp/up/a"])


def test_a_batch_without_targets_is_a_zero_loss(key):
    run, begin, frozen = setup(key)
    batch = tiny.batch(0)
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    _, metrics = run(begin, frozen, tiny.micro(batch, 2))
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), int(metrics["skipped"])) == (0.0, 0.0, 0)


def test_dropout_differs_by_step_and_is_off_in_evaluation(key):
    config = OptimConfig(name="sgd", lr=1e-20, clip_norm=None)
    run, now, frozen = setup(key, config, rate=0.5)
    batch = tiny.batch(0)
    losses = []
    for _ in range(2):
        now, metrics = run(now, frozen, tiny.micro(batch, 1))
        losses.append(float(metrics["loss"]))
    plain, same, undropped = setup(key, config)
    _, want = plain(same, undropped, tiny.micro(batch, 1))
    assert losses[0] != losses[1] and losses[0] != float(want["loss"])
    evaluate = step.make_eval_step(SFT_ROW, SFT(), tiny.score)
    mean = evaluate(now.trainable, None, frozen, tiny.micro(batch, 4))["loss/sft"]
    assert float(mean.total / mean.weight) == pytest.approx(float(want["loss"]), rel=1e-6)


def test_several_terms_and_a_reference(key):
    """Two terms with weights of their own, one counting rows and one tokens, and a view of the start."""

    def fn(config, scores, batch, carry):
        logp, ref = scores["policy"]["logp"], scores["reference"]["logp"]
        keep = batch["loss_mask"]
        pull = jnp.where(keep, (logp - ref) ** 2, 0.0)
        rows = jnp.any(keep, axis=1)
        terms = {
            "nll": Mean(-jnp.sum(jnp.where(keep, logp, 0.0)), jnp.sum(keep, dtype=jnp.float32)),
            "pull": Mean(jnp.sum(pull), jnp.sum(rows, dtype=jnp.float32)),
        }
        return terms, {}

    objective = Objective(config=SFT, fn=fn, views=("policy", "reference"))
    trainable, frozen = tiny.parts(key)
    optimizer = optim.make(OptimConfig(name="sgd", lr=0.1, warmup_steps=0, clip_norm=None), trainable, 10)
    run = step.make_step(objective, SFT(), tiny.score, optimizer)
    results = []
    for accumulate in (1, 4):
        now = state.create(trainable, optimizer, key, reference=True)
        for seed in range(3):
            now, metrics = run(now, frozen, tiny.micro(tiny.batch(seed), accumulate))
        close(now.start, trainable, rtol=0, atol=0)
        results.append((now.trainable, metrics))
    close(*results, rtol=1e-5, atol=1e-6)
    metrics = results[0][1]
    assert float(metrics["loss"]) == pytest.approx(float(metrics["loss/nll"] + metrics["loss/pull"]), rel=1e-6)
    assert float(metrics["loss/pull"]) > 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_equals_single_device(name, key):
    """Rows over `data`, trained matrices over `fsdp`, the state sharded like them: the single-device step."""
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    trainable, frozen = tiny.parts(key)
    optimizer = optim.make(OptimConfig(name=name, lr=0.01), trainable, 10)
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))  # noqa: E731
    where = jax.tree.map(lambda a: place(None, "fsdp" if a.shape[1] == 8 else None), trainable)
    shapes = state.abstract(trainable, optimizer, key)
    states = state.shardings(shapes, where, place())
    shardings = step.Shardings(states, place(), place(None, ("data", "fsdp")))
    single = state.create(trainable, optimizer, key)
    sharded = state.create(trainable, optimizer, key, shardings=states)
    run_single = step.make_step(SFT_ROW, SFT(), tiny.score, optimizer)
    run_sharded = step.make_step(SFT_ROW, SFT(), tiny.score, optimizer, shardings)
    there = jax.device_put(frozen, place())
    with tiny.compiles() as count:
        for seed in range(4):
            batch = tiny.micro(tiny.batch(seed), 2)
            single, want = run_single(single, frozen, batch)
            sharded, got = run_sharded(sharded, there, jax.device_put(batch, shardings.batch))
            close(got, want)
    assert count == ["jit(step)"] * 2
    close(sharded.trainable, single.trainable)
    assert sharded.trainable["layers"]["mlp"]["up"].a.sharding.spec == PartitionSpec(None, "fsdp")


def test_moments_are_sharded_like_what_they_belong_to(key):
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    trainable, _ = tiny.parts(key)
    optimizer = optim.make(OptimConfig(), trainable, 10)
    split, whole = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda a: split if a.shape[1] == 8 else whole, trainable)
    got = state.shardings(state.abstract(trainable, optimizer, key, reference=True), where, whole)
    assert {path for path, leaf in tree.paths(got) if leaf == split} == {
        "trainable/layers/mlp/up/a",
        "start/layers/mlp/up/a",
        "opt_state/1/mu/layers/mlp/up/a",
        "opt_state/1/nu/layers/mlp/up/a",
    }


def test_bfloat16_trainables_are_kept_in_float32(key):
    trainable, _ = tiny.parts(key)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), trainable)
    optimizer = optim.make(OptimConfig(), half, 10)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.create(half, optimizer, key).trainable)} == {"float32"}


def test_integers_cannot_train(key):
    with pytest.raises(ValueError, match="cannot train integer arrays: w"):
        trainable = {"w": jnp.ones((2,), jnp.int8)}
        state.create(trainable, optim.make(OptimConfig(), trainable, 10), key)
