"""What couples the rows of a step, runs from step to step, moves the reference, or comes from another model."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import tree
from jaxft.objectives import terms
from jaxft.objectives.terms import Follow, Mean, Objective
from jaxft.training import optim, state, step, sweep
from jaxft.training.config import OptimConfig
from tests.training import tiny


@dataclass(frozen=True)
class Settings:
    """Of an objective that exists here only."""

    decay: float = 0.5


def centred(config, scores, batch, carry):
    """Squares of rows' log-ratios about the mean of the whole batch, and about a running mean."""
    ratio = row_ratio(scores, batch)
    keep = jnp.any(batch["loss_mask"], 1)
    about = terms.masked((ratio - batch["centre"]) ** 2, keep)
    return {"about": about, "running": terms.masked((ratio - carry["mean"]) ** 2, keep)}, {
        "ratio": terms.masked(ratio, keep)
    }


def row_ratio(scores, batch, aside=""):
    logp = scores["policy" + aside]["logp"] - scores["reference" + aside]["logp"]
    return jnp.sum(jnp.where(batch["loss_mask"], logp, 0.0), 1)


def annotate(config, scores, batch, carry):
    beside = {"loss_mask": batch["kl_loss_mask"]}
    centre = jnp.mean(row_ratio(scores, batch)) + jnp.mean(row_ratio(scores, beside, "/kl"))
    mean = config.decay * carry["mean"] + (1 - config.decay) * centre
    return {"centre": jnp.broadcast_to(centre, batch["tokens"].shape[:1])}, {"mean": mean}


ROW = Objective(
    Settings,
    centred,
    views=("policy", "reference"),
    asides=("kl",),
    annotate=annotate,
    carry=lambda config: {"mean": jnp.float32(0.25)},
    follow=lambda config: Follow(0.6, 2),
)


def batch(seed, rows=8):
    beside = tiny.batch(seed + 100, rows)
    return tiny.batch(seed, rows) | {f"kl_{name}": value for name, value in beside.items()}


def begin(row=ROW):
    trainable, frozen = tiny.parts(jax.random.key(0))
    optimizer = optim.make(OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0), trainable, 10)
    first = state.create(trainable, optimizer, jax.random.key(1), True, row.carry(Settings()))
    moved = jax.tree.map(lambda a: a + 0.1, trainable)
    return first._replace(trainable=moved), frozen, optimizer


@pytest.mark.parametrize("row", [ROW])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(row):
    """Parameters, carry and metrics, after two steps."""
    ends = []
    for parts in (1, 4):
        now, frozen, optimizer = begin()
        run = step.make_step(row, Settings(), tiny.score, optimizer)
        for number in range(2):
            now, metrics = run(now, frozen, tiny.micro(batch(number), parts))
        ends.append((now.trainable, now.start, now.carry, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *ends)


def test_the_gradient_is_of_the_loss_with_the_annotation_held_fixed():
    now, frozen, optimizer = begin()
    whole = batch(0)

    def ratios(trainable, part):
        policy = tiny.score("policy", tree.combine(trainable, frozen), part)["logp"]
        start = tiny.score("reference", tree.combine(now.start, frozen), part)["logp"]
        return jnp.sum(jnp.where(part["loss_mask"], policy - start, 0.0), 1)

    beside = {name.removeprefix("kl_"): value for name, value in whole.items() if name.startswith("kl_")}
    centre = jnp.mean(ratios(now.trainable, whole)) + jnp.mean(ratios(now.trainable, beside))
    mean = 0.5 * 0.25 + 0.5 * centre

    def loss(trainable):
        ratio, keep = ratios(trainable, whole), jnp.any(whole["loss_mask"], 1)
        return sum(jnp.sum(jnp.where(keep, (ratio - c) ** 2, 0)) / jnp.sum(keep) for c in (centre, mean))

    value, grads = jax.value_and_grad(loss)(now.trainable)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    _, metrics = step.make_step(ROW, Settings(), tiny.score, optimizer)(now, frozen, tiny.micro(whole, 1))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_the_reference_follows_every_second_step_and_a_skipped_step_moves_nothing():
    now, frozen, optimizer = begin()
    run = step.make_step(ROW, Settings(), tiny.score, optimizer)
    start = jax.tree.map(np.asarray, now.start)
    now, _ = run(now, frozen, tiny.micro(batch(0), 1))
    jax.tree.map(np.testing.assert_array_equal, now.start, start)
    now, _ = run(now, frozen, tiny.micro(batch(1), 1))
    jax.tree.map(
        lambda s, p, old: np.testing.assert_allclose(s, 0.6 * np.asarray(p) + 0.4 * old, rtol=1e-6, atol=1e-7),
        now.start, now.trainable, start,
    )  # fmt: skip
    now, _ = run(now, frozen, tiny.micro(batch(2), 1))
    kept = jax.tree.map(np.asarray, (now.start, now.carry, now.trainable))
    broken = step.make_step(ROW, Settings(), tiny.poisoned_score, optimizer)
    bad = batch(3)
    bad["tokens"][0, 0] = 7
    now, metrics = broken(now, frozen, tiny.micro(bad, 1))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, (now.start, now.carry, now.trainable), kept)


def test_evaluation_annotates_too():
    now, frozen, optimizer = begin()
    evaluate = step.make_eval_step(ROW, Settings(), tiny.score)
    whole = batch(5)
    found = [evaluate(now.trainable, now.start, frozen, tiny.micro(whole, n), now.carry) for n in (1, 4)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)
    _, metrics = step.make_step(ROW, Settings(), tiny.score, optimizer)(now, frozen, tiny.micro(whole, 1))
    values = terms.values(found[0])
    np.testing.assert_allclose(values["loss/about"], metrics["loss/about"], rtol=1e-5)
    assert abs(values["loss/running"] - metrics["loss/running"]) > 1e-3  # what held-out data say moves nothing


def test_members_of_a_sweep_are_annotated_each_for_itself():
    now, frozen, optimizer = begin()
    alone, metrics = step.make_step(ROW, Settings(), tiny.score, optimizer)(
        jax.tree.map(jnp.copy, now), frozen, tiny.micro(batch(0), 1)
    )
    made = sweep.make_optimizer(
        OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0), now.trainable, [1e-2, 1e-2], 10
    )
    double = lambda a: jnp.stack([a, a])  # noqa: E731
    both = jax.tree.map(double, now)
    axes = tree.combine(jax.tree.map(lambda a: 0, now.trainable), jax.tree.map(lambda a: None, frozen))

    def score(view, params, batch, key=None):
        own = (axes, 0, None if key is None else 0)
        return jax.vmap(lambda p, b, k: tiny.score(view, p, b, k), in_axes=own)(params, batch, key)

    run = sweep.make_step(ROW, Settings(), score, made, 2)
    both, more = run(both, frozen, tiny.micro(batch(0), 1))
    np.testing.assert_allclose(more["loss"], [metrics["loss"]] * 2, rtol=1e-5)
    np.testing.assert_allclose(both.carry["mean"], [alone.carry["mean"]] * 2, rtol=1e-5)
    with pytest.raises(ValueError, match=r"train.accumulate"):
        run(both, frozen, tiny.micro(batch(1), 2))


def test_log_probabilities_found_beforehand_stand_in_for_the_reference():
    now, frozen, optimizer = begin()
    whole = batch(0)
    for part in ("", "kl_"):
        own = {name.removeprefix(part): value for name, value in whole.items() if name.startswith(part)}
        whole[f"{part}ref_logp"] = np.asarray(tiny.score("reference", tree.combine(now.start, frozen), own)["logp"])
    run = step.make_step(dataclasses.replace(ROW, follow=lambda config: None), Settings(), tiny.score, optimizer)
    _, live = run(jax.tree.map(jnp.copy, now), frozen, tiny.micro(batch(0), 1))
    _, stored = run(now._replace(start=None), frozen, tiny.micro(whole, 1))
    np.testing.assert_allclose(live["loss"], stored["loss"], rtol=1e-6)


def test_a_teacher_is_another_model_whose_word_the_policy_finds_in_its_batch():
    def score(view, params, batch, key=None):
        out = tiny.score(view, params, batch, key)
        return out if view == "teacher" else out | {"apart": out["logp"] - batch["teacher"]["logp"]}

    def fn(config, scores, batch, carry):
        assert set(scores) == {"policy"}
        return {"apart": terms.masked(scores["policy"]["apart"] ** 2, batch["loss_mask"])}, {}

    now, frozen, optimizer = begin()
    teacher = tiny.params(jax.random.key(9))
    row = Objective(Settings, fn, views=("teacher", "policy"))
    whole = tiny.batch(0)
    expected = jnp.square(
        tiny.score("", tree.combine(now.trainable, frozen), whole)["logp"] - tiny.score("", teacher, whole)["logp"]
    )
    run = step.make_step(row, Settings(), score, optimizer)
    _, metrics = run(now, step.Models(frozen, {"teacher": teacher}), tiny.micro(whole, 2))
    mean = jnp.sum(jnp.where(whole["loss_mask"], expected, 0)) / whole["loss_mask"].sum()
    np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-5)


def test_a_view_without_parameters_is_refused():
    now, frozen, optimizer = begin()
    row = Objective(Settings, lambda *_: ({"none": Mean(jnp.float32(0), jnp.float32(1))}, {}), views=("judge",))
    with pytest.raises(ValueError, match=r"judge.*policy, reference"):
        step.make_step(row, Settings(), tiny.score, optimizer)(now, frozen, tiny.micro(tiny.batch(0), 1))
