"""CPO, SimPO and AlphaPO: trl's losses, rewards and gradients, with the likelihood of the chosen beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import CPO, OBJECTIVES, SimPO, cpo, divergences
from tests.objectives import completions, trl_reference
from tests.objectives.whole import total

SETTINGS = [
    CPO(beta=0.3),
    CPO(beta=0.3, label_smoothing=0.1, cpo_alpha=0.0),
    CPO(loss="hinge", beta=0.2, cpo_alpha=0.5),
    CPO(loss="ipo", beta=0.4),
    CPO(loss="simpo", beta=2.0, label_smoothing=0.1, simpo_gamma=1.5),
    CPO(beta=0.2, alpha=0.05),
    SimPO(beta=2.5, simpo_gamma=0.1, alpha=0.25),
]


@pytest.mark.parametrize("a_row", [2, 4])
@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{type(c).__name__}-{c.loss}-{c.alpha}")
def test_loss_gradient_and_rewards_are_those_of_trl(config, a_row):
    given = completions.draw(12, seed=5)
    length = given.completion.sum(1) if config.loss in ("ipo", "simpo") else np.ones(len(given.logp))
    logp = (np.where(given.completion, given.logp, 0).sum(1) / length).reshape(-1, 2).T.astype(np.float32)
    losses, rewards, pair_grad = trl_reference.cpo(
        logp, beta=config.beta, loss_type=config.loss, label_smoothing=config.label_smoothing,
        simpo_gamma=config.simpo_gamma, alpha=config.alpha,
    )  # fmt: skip
    chosen = given.completion.copy()
    chosen[1::2] = False
    nll = -given.logp[chosen].mean()
    grad = -config.cpo_alpha * chosen / chosen.sum()
    grad = grad + (pair_grad.T.reshape(-1) / len(losses) / length)[:, None] * given.completion

    row = OBJECTIVES["simpo" if isinstance(config, SimPO) else "cpo"]
    value, got, metrics = total(row, config, *completions.rows(given, a_row, room=2))
    assert value == pytest.approx(losses.mean() + config.cpo_alpha * nll, rel=1e-5)
    np.testing.assert_allclose(completions.back(np.asarray(got), given, a_row), grad, rtol=1e-4, atol=1e-6)
    for name, number in {
        "rewards/chosen": rewards[0].mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).mean(),
        "logps/rejected": logp[1].mean(),
        "nll_loss": nll,
    }.items():
        assert metrics[name] == pytest.approx(number, rel=1e-5), name


def test_by_hand():
    """Difference 4 of rewards, β = 1/2: -log σ(2); with γ = 1 -log σ(1); hinge max(0, 1 - 2); ipo (4 - 1)²."""
    for config, want in (
        (CPO(beta=0.5), 0.126928),
        (SimPO(beta=0.5, simpo_gamma=1.0), 0.31326169),
        (CPO(loss="hinge", beta=0.5), 0.0),
        (CPO(loss="ipo", beta=0.5), 9.0),
    ):
        assert float(cpo.pair_loss(config, jnp.float32(4))) == pytest.approx(want, rel=1e-5)
    assert float(divergences.power(jnp.log(jnp.float32(0.25)), -0.5)) == pytest.approx(-2.0)  # (1 - 1/√¼) / ½


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{type(c).__name__}-{c.loss}-{c.alpha}")
def test_extremes_are_finite_and_so_are_their_gradients(config):
    def loss(chosen, rejected):
        reward = (divergences.power(x, -config.alpha) for x in (chosen, rejected))
        return cpo.pair_loss(config, next(reward) - next(reward))

    values = [x.ravel() for x in jnp.meshgrid(*[jnp.array([-1e8, -1e4, -100.0, -1.0, 0.0])] * 2)]
    grads = jax.vmap(jax.grad(loss, argnums=(0, 1)))(*values)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (loss(*values), *grads))


def test_simpo_is_cpo_without_the_likelihood():
    assert SimPO() == SimPO(loss="simpo", cpo_alpha=0.0, beta=0.1, simpo_gamma=0.5)
    scores, batch = completions.rows(completions.draw(4), 2)
    assert set(OBJECTIVES["simpo"].fn(SimPO(), scores, batch, {})[0]) == {"simpo"}
    assert OBJECTIVES["simpo"].asked(SimPO()).views == OBJECTIVES["cpo"].asked(CPO()).views == ("policy",)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, r"objective.beta: got 0.0"),
        ({"cpo_alpha": -1.0}, r"objective.cpo_alpha: got -1.0"),
        ({"loss": "hinge", "label_smoothing": 0.1}, r"objective.label_smoothing: got 0.1.*hinge"),
        ({"simpo_gamma": 1.0}, r"objective.simpo_gamma: got 1.0.*sigmoid"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CPO(**settings)
