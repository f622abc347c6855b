"""ORPO: trl's odds, the likelihood of whole chosen sequences, and means that padding does not move."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import OBJECTIVES, ORPO, orpo, terms
from tests.objectives import completions, trl_reference
from tests.objectives.whole import total

ROW = OBJECTIVES["orpo"]


def means(given, logp):
    """Mean log-prob of each completion [2, P]: chosen, rejected."""
    mean = np.where(given.completion, logp, 0).sum(1) / given.completion.sum(1)
    return np.stack([mean[::2], mean[1::2]]).astype(np.float32)


@pytest.mark.parametrize("a_row", [2, 4])
def test_loss_and_gradient_are_those_of_trl(a_row):
    """The odds by trl's method; the likelihood is the mean over chosen sequences' tokens but the first, prompts too."""
    given = completions.draw(12, seed=4)
    odds, odds_grad = trl_reference.orpo(means(given, given.logp), beta=0.3)
    tokens = given.real.copy()
    tokens[:, 0] = tokens[1::2] = False
    want = -given.logp[tokens].mean() - odds.mean()
    grad = np.zeros(given.logp.shape)
    grad[tokens] -= 1 / tokens.sum()
    for side, g in enumerate(odds_grad):
        grad[side::2] -= (g / len(g) / given.completion[side::2].sum(1))[:, None] * given.completion[side::2]

    value, got, metrics = total(ROW, ORPO(beta=0.3), *completions.rows(given, a_row, room=2))
    assert value == pytest.approx(want, rel=2e-6)
    np.testing.assert_allclose(completions.back(np.asarray(got), given, a_row), grad, rtol=1e-4, atol=1e-7)
    chosen, rejected = means(given, given.logp)
    log_odds = chosen - rejected - np.log1p(-np.exp(chosen)) + np.log1p(-np.exp(rejected))
    expected = {
        "nll_loss": -given.logp[tokens].mean(),
        "log_odds_ratio": odds.mean() / 0.3,
        "log_odds_chosen": log_odds.mean(),
        "logps/chosen": chosen.mean(),
        "rewards/rejected": 0.3 * rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
    }
    for name, number in expected.items():
        assert metrics[name] == pytest.approx(number, rel=2e-5), name


def test_odds_by_hand():
    """P = 1/5 has odds 1/4; P = 3/4 has odds 3."""
    got = orpo.log_odds(jnp.log(jnp.array([0.2, 0.75])))
    np.testing.assert_allclose(got, [-math.log(4), math.log(3)], rtol=1e-6)


def test_extremes_are_finite_and_so_are_their_gradients():
    values = jnp.array([-1e8, -200.0, -1.0, -0.6931472, -1e-3, -1e-30, 0.0])
    grad = jax.vmap(jax.grad(orpo.log_odds))(values)
    assert bool(jnp.all(jnp.isfinite(orpo.log_odds(values)))) and bool(jnp.all(jnp.isfinite(grad)))


def test_weights_depend_on_the_batch_alone():
    scores, batch = completions.rows(completions.draw(8, seed=2), 4)
    losses, _ = ROW.fn(ORPO(), jax.tree.map(jnp.zeros_like, scores), batch, {})
    other, _ = ROW.fn(ORPO(), scores, batch, {})
    assert {n: float(m.weight) for n, m in losses.items()} == {n: float(m.weight) for n, m in other.items()}
    assert float(losses["odds_ratio"].weight) == 4.0 and terms.values(losses)["nll"] == 0.0


def test_it_wants_no_reference():
    assert ROW.asked(ORPO()) == (("logp",), ("correct", "entropy"), ("policy",), (), ()) and ROW.rows == "pairs"
    with pytest.raises(ValueError, match=r"objective.beta: got -1"):
        ORPO(beta=-1)
