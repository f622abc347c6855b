"""Bradley-Terry: trl's numbers, whatever the rows' layout and parts."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer.reward_trainer import RewardTrainer

from jaxft.objectives import OBJECTIVES, Reward, reward, terms
from tests.objectives import completions
from tests.objectives.trl_reference import ACCELERATOR

ROW = OBJECTIVES["reward"]
PAIRS, A_ROW, ROOM = 6, 4, 2


def draw(seed=0):
    """Rewards of chosen and rejected, and margins."""
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1.5, (PAIRS, 2)).astype(np.float32), rng.exponential(1.0, PAIRS).astype(np.float32)


def rows(rewards, margin=None, seed=0):
    """Two pairs a row, with room for one more; NaN for a reward at any token but the last of a sequence."""
    given = completions.draw(2 * PAIRS, seed)
    last = given.real & ~np.pad(given.real[:, 1:], ((0, 0), (0, 1)))
    said = np.where(last, rewards.reshape(-1, 1), np.float32(np.nan))
    scores, batch = completions.rows(given.__class__(**{**vars(given), "logp": said}), A_ROW, room=ROOM)
    if margin is not None:
        spread = np.stack([margin, np.zeros_like(margin)], 1).reshape(-1, A_ROW)
        batch["margin"] = jnp.asarray(np.pad(spread, ((0, 0), (0, ROOM)), constant_values=7.0))
    return {"policy": {"reward": scores["policy"]["logp"]}}, batch


def trl(rewards, margin, coefficient):
    """(loss, gradient [PAIRS, 2], metrics) of trl's trainer on a model that says these rewards."""
    said = torch.tensor(rewards.T.reshape(-1, 1), requires_grad=True)  # all chosen before all rejected

    def said_by(**_):
        return SimpleNamespace(logits=said)

    model: Any = said_by
    model.training = True
    found: Any = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=coefficient or None),
        accelerator=ACCELERATOR,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * PAIRS, 3)}
    inputs |= {} if margin is None else {"margin": torch.tensor(margin)}
    loss: Any = RewardTrainer.compute_loss(found, model, inputs)
    loss.backward()
    metrics = {name: float(np.mean(values)) for name, values in found._metrics["train"].items()}
    return loss.item(), np.asarray(said.grad).reshape(2, PAIRS).T, metrics


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("margins", [False, True], ids=["plain", "margins"])
def test_loss_gradient_and_metrics_are_those_of_trl(margins, coefficient):
    rewards, margin = draw()
    margin = margin if margins else None
    scores, batch = rows(rewards, margin)
    config = Reward(center_rewards_coefficient=coefficient)

    def fn(said):
        losses, metrics = ROW.fn(config, {"policy": {"reward": said}}, batch, {})
        return sum(terms.values(losses).values()), metrics

    (value, metrics), grad = jax.jit(jax.value_and_grad(fn, has_aux=True))(scores["policy"]["reward"])
    want, want_grad, want_metrics = trl(rewards, margin, coefficient)
    assert float(value) == pytest.approx(want, rel=1e-5)
    at_end = grad[~np.isnan(scores["policy"]["reward"])]
    np.testing.assert_allclose(at_end.reshape(PAIRS, 2), want_grad, rtol=1e-5, atol=1e-7)
    assert np.count_nonzero(grad) == 2 * PAIRS
    found = terms.values(metrics)
    for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        assert float(found[name]) == pytest.approx(want_metrics[name], rel=1e-5), name
    probability = 1 / (1 + np.exp(rewards[:, 1] - rewards[:, 0]))
    assert float(found["brier"]) == pytest.approx(np.mean((1 - probability) ** 2), rel=1e-5)


def test_parts_add_up_and_an_empty_one_counts_nothing():
    """Three rows, the last one without any sequence; trl too takes least and greatest of each part and their mean."""
    rewards, margin = draw(1)
    scores, batch = rows(rewards, margin)
    batch["sequence_mask"] = batch["sequence_mask"].at[2].set(False)
    config = Reward(center_rewards_coefficient=0.1)
    fn = jax.jit(ROW.fn, static_argnums=0)
    parts = [fn(config, *jax.tree.map(lambda a, i=i: a[i : i + 1], (scores, batch)), {}) for i in range(3)]
    whole = terms.values(fn(config, scores, batch, {})[0])
    added = terms.values(terms.add(terms.add(parts[0][0], parts[1][0]), parts[2][0]))
    for name, value in whole.items():
        assert float(added[name]) == pytest.approx(float(value), rel=1e-6), name
    assert all(
        float(mean.weight) == float(mean.total) == 0.0 for mean in (*parts[2][0].values(), *parts[2][1].values())
    )
    least = [float(p[1]["min_reward"].total) for p in parts[:2]]
    np.testing.assert_allclose(least, rewards.reshape(3, -1).min(1)[:2], rtol=1e-6)


def test_equal_rewards_cost_ln_2_and_the_loss_is_a_plain_function():
    assert float(reward.loss(jnp.float32(3.0), jnp.float32(3.0))) == pytest.approx(math.log(2))
    margin = reward.loss(jnp.float32(2.0), jnp.float32(0.5), jnp.float32(1.5))
    assert float(margin) == pytest.approx(math.log(2))


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_a_coefficient_that_makes_no_sense_is_refused(value):
    with pytest.raises(
        ValueError, match=r"objective\.center_rewards_coefficient: got .* expected a number, at least 0"
    ):
        Reward(center_rewards_coefficient=value)
