"""BCO: hand arithmetic, and a mean of rewards that runs from step to step."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import BCO, OBJECTIVES, terms
from tests.objectives import completions
from tests.objectives.whole import annotated, part_of, total

ROW = OBJECTIVES["bco"]


def rows(seed, a_row=2, room=1):
    given = completions.draw(8, seed)
    scores, batch = completions.rows(given, a_row, room=room)
    label = np.random.default_rng(seed).random((8 // a_row, a_row + room)) < 0.5
    return given, label, scores, batch | {"label": jnp.asarray(label)}


def rewards(given, beta):
    return beta * np.where(given.completion, given.logp - given.ref, 0).sum(1, dtype=np.float64)


def test_the_mean_is_of_all_rewards_so_far():
    """Losses of three steps, against the mean over every reward seen, those of the step included."""
    config, carry, seen = BCO(beta=0.2), ROW.carry(BCO()), []
    for step in range(3):
        given, label, scores, batch = rows(step)
        reward = rewards(given, 0.2)
        seen += list(reward)
        value, _, metrics = total(ROW, config, scores, batch, carry)
        sign = np.where(label[:, :2].ravel(), 1, -1)
        want = np.log1p(np.exp(-sign * (reward - np.mean(seen)))).mean()
        assert value == pytest.approx(want, rel=1e-5)
        assert metrics["delta"] == pytest.approx(np.mean(seen), rel=1e-5)
        _, carry = annotated(ROW, config, scores, batch, carry)
    assert float(carry["count"]) == 24.0


def test_by_hand():
    """Rewards 3 (desirable) and -1 (not): δ = 1, and -log σ(2) each; gradients -σ(-2)/2 and +σ(-2)/2, δ being fixed."""
    batch = {
        "segments": jnp.array([[1, 2]]), "loss_mask": jnp.ones((1, 2), bool), "sequence_mask": jnp.ones((1, 2), bool),
        "label": jnp.array([[True, False]]),
    }  # fmt: skip
    scores = {"policy": {"logp": jnp.array([[-1.0, -3.0]])}, "reference": {"logp": jnp.array([[-4.0, -2.0]])}}
    value, grad, metrics = total(ROW, BCO(beta=1.0), scores, batch, ROW.carry(BCO()))
    assert value == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)
    np.testing.assert_allclose(grad, [[-0.1192029 / 2, 0.1192029 / 2]], rtol=1e-5)
    assert metrics["rewards/margins"] == 4.0 and metrics["delta"] == 1.0


def test_a_batch_of_one_kind_has_no_margin():
    _, _, scores, batch = rows(5)
    batch["label"] = jnp.ones(batch["label"].shape, bool)
    *_, metrics = total(ROW, BCO(), scores, batch, ROW.carry(BCO()))
    assert metrics["rewards/margins"] == 0.0 and metrics["rewards/rejected"] == 0.0 and metrics["rewards/chosen"] != 0


def test_padding_and_parts_change_nothing():
    given, label, scores, batch = rows(7)
    carry = {"mean": jnp.float32(0.5), "count": jnp.float32(3)}
    value, grad, metrics = total(ROW, BCO(), scores, batch, carry)
    packed, laid = completions.rows(given, 4)
    laid["label"] = jnp.asarray(label[:, :2].reshape(2, 4))
    again, other, more = total(ROW, BCO(), packed, laid, carry)
    assert again == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(
        completions.back(np.asarray(other), given, 4), completions.back(np.asarray(grad), given), rtol=1e-5, atol=1e-9
    )
    assert more == pytest.approx(metrics, rel=1e-5)
    whole, after = annotated(ROW, BCO(), scores, batch, carry)
    found = [part_of(ROW, BCO(), scores, whole, after, *part)[0] for part in ((0, 1), (1, 4))]
    assert float(terms.values(terms.add(*found))["bco"]) == pytest.approx(value, rel=1e-6)


def test_extremes_are_finite_and_what_it_asks_for():
    _, _, scores, batch = rows(1)
    scores["policy"]["logp"] = scores["policy"]["logp"] * 1e7
    value, grad, _ = total(ROW, BCO(), scores, batch, ROW.carry(BCO()))
    assert math.isfinite(value) and bool(jnp.all(jnp.isfinite(grad)))
    assert ROW.asked(BCO()) == (("logp",), ("correct", "entropy"), ("policy", "reference"), (), ())
    with pytest.raises(ValueError, match=r"objective.beta: got 0"):
        BCO(beta=0)
