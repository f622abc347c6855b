"""The reliability table and its error, against arithmetic on single predictions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import OBJECTIVES, PRM, Reward, calibration, terms


def table(probability, outcome, low):
    """Of each bin that something falls in: (share, mean probability, frequency)."""
    edges = np.linspace(low, 1, calibration.BINS + 1)
    rows = []
    for b in range(calibration.BINS):
        held = (probability >= edges[b]) & ((probability < edges[b + 1]) | (b == calibration.BINS - 1))
        rows.append((held.mean(), probability[held].mean(), outcome[held].mean()) if held.any() else (0, 0, 0))
    return np.array(rows)


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_table_and_error_of_data_in_two_batches(low):
    """What is not kept is NaN; bins that stay empty are among them, and 1 falls in the last."""
    rng = np.random.default_rng(0)
    probability = np.round(rng.uniform(low, 1, 60) ** 2 * (1 - low) + low, 4).astype(np.float32).clip(low, 0.9199)
    probability[3] = 1.0
    outcome, keep = rng.random(60) < probability, rng.random(60) < 0.8
    given = np.where(keep, probability, np.float32(np.nan)).reshape(2, 5, 6)
    halves = [
        calibration.reliability(*map(jnp.asarray, part), low=low)
        for part in zip(given, outcome.reshape(2, 5, 6), keep.reshape(2, 5, 6), strict=True)
    ]
    values = terms.values(terms.add(*halves))
    want = table(probability[keep], outcome[keep], low)
    np.testing.assert_allclose(np.stack([values[n] for n in calibration.TABLE], 1), want, rtol=1e-5, atol=1e-7)
    said = calibration.concluded({**values, "accuracy": 0.5})
    assert said.pop("accuracy") == 0.5
    assert said == {"calibration_error": pytest.approx(np.sum(want[:, 0] * np.abs(want[:, 1] - want[:, 2])), rel=1e-5)}


def examine(name, *given):
    fn = OBJECTIVES[name].examine
    assert fn is not None
    return fn(*given)


def test_a_reward_model_is_asked_how_sure_it_is_of_the_better_one():
    """Differences of 0.1 (right), -0.1 (wrong), 3 and 3 (right): σ is .525 and .953."""
    segments = jnp.asarray([[1, 2, 3, 4], [1, 2, 3, 4]])
    batch = {"segments": segments, "sequence_mask": jnp.ones((2, 4), bool)}
    said = jnp.asarray([[0.1, 0.0, 0.0, 0.1], [2.0, -1.0, 1.0, -2.0]])
    values = terms.values(examine("reward", Reward(), {"policy": {"reward": said}}, batch, {}))
    share, predicted, observed = (np.asarray(values[n]) for n in calibration.TABLE)
    np.testing.assert_allclose(share[[0, 9]], [0.5, 0.5])
    np.testing.assert_allclose(predicted[[0, 9]], [0.52498, 0.95257], rtol=1e-4)
    np.testing.assert_allclose(observed[[0, 9]], [0.5, 1.0])
    assert not np.any(share[1:9])


def test_steps_are_asked_with_the_probability_that_they_are_right():
    batch = {"step_mask": jnp.asarray([[True, True, False]]), "step_label": jnp.asarray([[True, False, True]])}
    said = {"policy": {"reward": jnp.asarray([[2.0, -2.0, 9.0]])}}
    values = terms.values(examine("prm", PRM(), said, batch, {}))
    np.testing.assert_allclose(np.asarray(values[calibration.SHARE])[[1, 8]], [0.5, 0.5])
    np.testing.assert_allclose(np.asarray(values[calibration.OBSERVED])[[1, 8]], [0.0, 1.0])
    assert calibration.concluded(values)["calibration_error"] == pytest.approx(1 / (1 + np.exp(2.0)), rel=1e-5)
