"""A teacher that is the student's running mean, by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.objectives import OBJECTIVES, Distil
from jaxft.training import optim, state, step
from jaxft.training.config import OptimConfig


def score(view, params, batch, key=None):
    """A model of one number w: its divergence from a teacher t is (w - t)², and every target's log-probability -w."""
    del key
    w = params["w"][0]
    if view == "start":
        return {"hidden": w}
    assert view == "policy"
    shape = batch["tokens"].shape
    return {"divergence": jnp.full(shape, (w - batch["teacher"]["hidden"]) ** 2), "logp": jnp.full(shape, -w)}


def test_the_teacher_is_the_students_running_mean():
    """L = (w - t)² + w / 2 with w = t = 1 and a rate of 0.1: w becomes 1 - 0.1 * 0.5 = 0.95 and t = 0.75 + 0.25 * 0.95
    = 0.9875; then w = 0.95 - 0.1 * (0.5 - 2 * 0.0375) = 0.9075 and t = 0.75 * 0.9875 + 0.25 * 0.9075 = 0.9675."""
    trainable = {"w": jnp.ones(1)}
    config = OptimConfig(name="sgd", lr=0.1, schedule="constant", warmup_steps=0, betas=(0.0, 0.0), clip_norm=None)
    optimizer = optim.make(config, trainable, 2)
    now = state.create(trainable, optimizer, jax.random.key(0), True)
    settings = Distil(teacher="ema", ema=0.75, ce_weight=0.5)
    run = step.make_step(OBJECTIVES["distil"], settings, score, optimizer)
    batch = {"tokens": jnp.ones((1, 2, 3), jnp.int32), "loss_mask": jnp.ones((1, 2, 3), bool)}
    now, metrics = run(now, {"w": None}, batch)
    assert metrics["loss"] == 0.5 and metrics["divergence"] == 0
    assert [float(now.trainable["w"][0]), float(now.start["w"][0])] == pytest.approx([0.95, 0.9875])
    now, metrics = run(now, {"w": None}, batch)
    assert float(metrics["divergence"]) == pytest.approx(0.0375**2, rel=1e-4)
    assert [float(now.trainable["w"][0]), float(now.start["w"][0])] == pytest.approx([0.9075, 0.9675])


def test_what_a_running_mean_is_not():
    for more, told in (
        ({"ema": 1.0, "teacher": "ema"}, "objective.ema: got 1.0; expected 0 to below 1"),
        ({"ema": 0.9}, "objective.ema: got 0.9 with teacher=live"),
        ({"teacher": "ema", "divergence": "uld"}, "got uld with teacher=ema"),
    ):
        with pytest.raises(ValueError, match=told):
            Distil(**more)
