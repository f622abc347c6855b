"""REINFORCE and REINFORCE++: their definitions, token by token."""

import jax
import numpy as np
import pytest

from jaxft.objectives import GRPO, OBJECTIVES, Reinforce, terms
from tests.objectives import completions, trl_online, written

ROW = OBJECTIVES["reinforce"]
GIVEN = written.draw(8, 5)
REWARD = np.array([1, 0, 2, np.nan, 0.5, 1, 1, 3], np.float32)


def estimated(config, reward=REWARD, running=None):
    rollout = written.rollout(GIVEN, reward[:, None], 4)
    found = jax.jit(ROW.estimate, static_argnums=0)(
        config, rollout, ROW.running(config) if running is None else running
    )
    added, metrics, running = found
    back = completions.back(np.asarray(added["advantage"]), GIVEN, 1)
    return back, {name: float(x) for name, x in terms.values(metrics).items()}, running


def returns(gain, beta=0.0, gamma=1.0):
    """What is still to come at each token, by its definition."""
    out = np.full(GIVEN.logp.shape, np.nan)
    for row, keep in enumerate(GIVEN.completion):
        total = gain[row]
        for at in np.flatnonzero(keep)[::-1]:
            total = (total if at == np.flatnonzero(keep)[-1] else gamma * total) - beta * (GIVEN.old - GIVEN.ref)[
                row, at
            ]
            out[row, at] = total
    return out


def test_plus_plus():
    """The divergence is taken from the reward of each token, and all tokens of the rollout are whitened as one."""
    found, metrics, _ = estimated(Reinforce(baseline="none", beta=0.2, gamma=0.9, whiten=True, epsilon=0.2))
    want = returns(REWARD, beta=0.2, gamma=0.9)
    want = (want - np.nanmean(want)) / np.nanstd(want, ddof=1)
    np.testing.assert_allclose(found, np.nan_to_num(want), rtol=1e-4, atol=1e-6)
    kl = (GIVEN.old - GIVEN.ref)[GIVEN.completion].mean()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)


def test_baselines():
    """Group 0 has 1, 0, 2 and one of which nothing is known; group 1 has 0.5, 1, 1, 3."""
    group = REWARD - np.array([1.0] * 4 + [1.375] * 4)
    others = np.array([0, -1.5, 1.5, np.nan, -7 / 6, -0.5, -0.5, 13 / 6])
    for baseline, gain in (("group", group), ("leave_one_out", others), ("none", REWARD)):
        found, _, running = estimated(Reinforce(baseline=baseline))
        np.testing.assert_allclose(found, np.nan_to_num(returns(gain)), rtol=1e-5, atol=1e-6)
        assert running == {}


def test_the_running_mean_is_of_the_rollouts_before():
    """Means 1, 5, 3 and 2 with a decay of 1/2: compared with 1 (its own), 1, (1/2 · 1/2 + 5/2)/(3/4) = 11/3, and
    (1/8 + 5/4 + 3/2)/(7/8) = 23/7. A rollout of which nothing is known changes nothing."""
    config, running, seen = Reinforce(baseline_decay=0.5), None, []
    for mean in (1, 5, np.nan, 3, 2):
        reward = np.full(8, mean, np.float32)
        found, metrics, running = estimated(config, reward, running)
        seen.append(metrics["baseline"])
        if not np.isnan(mean):
            np.testing.assert_allclose(found[GIVEN.completion], mean - seen[-1], rtol=1e-5)
        else:
            assert not np.any(found)
    assert seen == pytest.approx([1, 1, 11 / 3, 11 / 3, 23 / 7], rel=1e-6)


@pytest.mark.parametrize("average, weight", [("tokens", None), ("sequences", 8)])
def test_the_gradient_is_that_of_the_policy(average, weight):
    scores, batch = written.rows(GIVEN)
    config = Reinforce(average=average)
    value, grads, metrics, _ = written.total(ROW, config, scores, batch)
    keep, weight = GIVEN.completion, weight or GIVEN.completion.sum()
    advantage = np.where(keep, GIVEN.advantage[:, None], 0)
    assert float(value) == pytest.approx(-(advantage * GIVEN.logp).sum() / weight, rel=1e-5)
    np.testing.assert_allclose(completions.back(np.asarray(grads["logp"]), GIVEN), -advantage / weight, rtol=1e-5)
    assert set(metrics) == {"entropy"}


def test_clipped_with_the_divergence_in_the_loss_is_dapo_of_trl():
    want, want_grad, _, want_metrics, _ = trl_online.grpo(
        GIVEN, GRPO(beta=0.1, use_bias_correction_kl=False, importance_sampling_correction="none")
    )
    config = Reinforce(epsilon=0.2, beta=0.1, kl_in="loss", kl_estimator="k3")
    value, grads, metrics, _ = written.total(ROW, config, *written.rows(GIVEN))
    assert float(value) == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(completions.back(np.asarray(grads["logp"]), GIVEN), want_grad, rtol=2e-4, atol=1e-7)
    assert {n: float(x) for n, x in metrics.items()} == pytest.approx(want_metrics, rel=2e-5, abs=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"objective.kl_estimator: got k1 in the loss"):
        Reinforce(beta=0.1, kl_in="loss")
    with pytest.raises(ValueError, match=r"objective.baseline_decay: got 1"):
        Reinforce(baseline_decay=1)
    assert ROW.asked(Reinforce()).rollout_needs == ("old_logp",)
    assert ROW.asked(Reinforce(beta=0.1)).rollout_needs == ("old_logp", "ref_logp")
    assert ROW.running(Reinforce(baseline="none")) == {}
