"""RLOO: trl's numbers and gradients on the same tensors; its advantages are compared in `test_estimates`."""

import numpy as np
import pytest

from jaxft.objectives import OBJECTIVES, RLOO
from tests.objectives import completions, trl_online, written

ROW = OBJECTIVES["rloo"]


@pytest.mark.parametrize("config", [RLOO(), RLOO(epsilon=0.4, epsilon_high=0.1)])
@pytest.mark.parametrize("a_row", [1, 4])
def test_loss_gradient_and_metrics_are_those_of_trl(config, a_row):
    given = written.draw(16, 7, odd=False)
    want, want_grad, want_metrics = trl_online.rloo(given, config.epsilon, config.epsilon_high or config.epsilon)
    value, grads, metrics, _ = written.total(ROW, config, *written.rows(given, a_row))
    assert float(value) == pytest.approx(want, rel=1e-5)
    found = completions.back(np.asarray(grads["logp"]), given, a_row)
    np.testing.assert_allclose(found, want_grad, rtol=2e-4, atol=1e-7)
    assert not np.any(found[~given.completion]) and np.any(found)
    assert {n: float(x) for n, x in metrics.items()} == pytest.approx(want_metrics, rel=2e-5, abs=1e-6)
    assert 0 < metrics["clip_ratio/region_mean"] < 1


def test_what_is_refused_and_asked_for():
    with pytest.raises(ValueError, match=r"objective.reward_clip_range: got \[1, 0\]; expected \[least, most\]"):
        RLOO(reward_clip_range=(1, 0))
    assert ROW.asked(RLOO()).rollout_needs == ("old_logp", "ref_logp")
    assert ROW.asked(RLOO(beta=0)).rollout_needs == ("old_logp",)
