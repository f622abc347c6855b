"""PPO: rewards, advantages and losses by their definitions, token by token and by torch's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft.objectives import OBJECTIVES, PPO, terms
from tests.objectives import completions, written

ROW = OBJECTIVES["ppo"]
GIVEN = written.draw(8, 6)
rng = np.random.default_rng(0)
VALUE, OLD_VALUE, RETURNS = (rng.normal(0, 1, GIVEN.logp.shape).astype(np.float32) for _ in range(3))
SCORE = np.array([1, 0, 2, np.nan, 0.5, 1, -1, 3], np.float32)
FINISHED = np.arange(8) != 4
KEEP = GIVEN.completion & ~np.isnan(SCORE)[:, None]
BEFORE = np.pad(VALUE[:, :-1], ((0, 0), (1, 0)))
"""The value of the state that each token is written in."""


def lay(x, a_row=2, room=1):
    given = written.dataclasses.replace(GIVEN, ref=x)
    return completions.rows(given, a_row, room=room)[0]["reference"]["logp"]


def estimated(config, running=None):
    rollout = written.rollout(GIVEN, SCORE[:, None], 4, finished=FINISHED) | {"value": lay(VALUE, 1, 0)}
    running = ROW.running(config) if running is None else running
    added, metrics, running = jax.jit(ROW.estimate, static_argnums=0)(config, rollout, running)
    found = {name: completions.back(np.asarray(x), GIVEN, 1) for name, x in added.items()}
    return found, {name: float(x) for name, x in terms.values(metrics).items()}, running


def expected(config, coef):
    """(rewards, advantages before whitening, returns) by their definitions, NaN where there is no token."""
    kl = GIVEN.old - GIVEN.ref
    kl = kl if config.kl_estimator == "k1" else np.exp(-kl) + kl - 1
    reward = np.where(KEEP, -coef * kl, np.nan)
    for row in np.flatnonzero(KEEP.any(1)):
        penalty = 0 if FINISHED[row] else config.missing_eos_penalty or 0
        reward[row, np.flatnonzero(KEEP[row])[-1]] += SCORE[row] - penalty
    if config.whiten_rewards:
        reward = (reward - np.nanmean(reward)) / np.nanstd(reward, ddof=1) + np.nanmean(reward)
    advantage = np.full(reward.shape, np.nan)
    for row, keep in enumerate(KEEP):
        later, following = 0.0, 0.0
        for at in np.flatnonzero(keep)[::-1]:
            delta = reward[row, at] + config.gamma * following - BEFORE[row, at]
            later, following = delta + config.gamma * config.lam * later, BEFORE[row, at]
            advantage[row, at] = later
    return np.where(KEEP, kl, 0).sum(1), advantage, advantage + BEFORE


@pytest.mark.parametrize(
    "config",
    [PPO(), PPO(kl_estimator="k3", gamma=0.9, lam=0.5, whiten_rewards=True, missing_eos_penalty=1.0), PPO(kl_coef=0.0)],
    ids=["defaults", "settings", "no reference"],
)
def test_estimate(config):
    found, metrics, running = estimated(config)
    kl, advantage, returns = expected(config, config.kl_coef)
    white = (advantage - np.nanmean(advantage)) / np.nanstd(advantage, ddof=1)
    np.testing.assert_allclose(found["advantage"], np.nan_to_num(white), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["returns"], np.nan_to_num(returns), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["old_value"], np.where(KEEP, BEFORE, 0))
    np.testing.assert_array_equal(found["loss_mask"] > 0, KEEP)
    known = ~np.isnan(SCORE)
    score = SCORE - np.where(FINISHED, 0, config.missing_eos_penalty or 0)
    taken = config.kl_coef * kl
    want = {
        "objective/kl": kl[known].mean() if config.kl_coef else 0,
        "objective/entropy": -np.where(KEEP, GIVEN.old, 0).sum(1)[known].mean(),
        "objective/non_score_reward": -taken[known].mean(),
        "objective/scores": np.nanmean(score),
        "objective/rlhf_reward": np.nanmean(score - taken),
        "objective/kl_coef": config.kl_coef,
        "val/num_eos_tokens": 7,
        "reward": np.nanmean(SCORE),
        "completions/clipped_ratio": 1 / 8,
    }
    assert {name: metrics[name] for name in want} == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert running == {} and ("ref_logp" in ROW.asked(config).rollout_needs) == (config.kl_coef > 0)


def test_the_weight_of_the_divergence_follows_it():
    """The error counts as a fifth of the target at most; the weight changes after the rollout."""
    kl = expected(PPO(kl_estimator="k3"), 0.0)[0][~np.isnan(SCORE)].mean()
    for factor, change in ((0.1, 0.2), (1 / 1.1, 0.1), (1 / 0.9, -0.1), (10, -0.2)):
        config = PPO(kl_estimator="k3", kl_coef=0.3, kl_target=float(kl * factor), kl_horizon=100)
        _, metrics, running = estimated(config)
        assert metrics["objective/kl_coef"] == pytest.approx(0.3)
        assert float(running["kl_coef"]) == pytest.approx(0.3 * (1 + change * 8 / 100), rel=1e-5)
    found, metrics, _ = estimated(config, {"kl_coef": jnp.float32(0.7)})
    advantage = expected(config, 0.7)[1]
    white = (advantage - np.nanmean(advantage)) / np.nanstd(advantage, ddof=1)
    np.testing.assert_allclose(found["advantage"], np.nan_to_num(white), rtol=1e-4, atol=1e-5)
    assert metrics["objective/kl_coef"] == pytest.approx(0.7)


def test_losses_and_gradients():
    """Against torch, over tokens of completions; the value of a token is what was said one token before."""
    config = PPO(cliprange=0.1, cliprange_value=0.5, vf_coef=0.3)
    keep = torch.tensor(GIVEN.completion)
    logp, value = (torch.tensor(x, requires_grad=True) for x in (GIVEN.logp, VALUE))
    advantage, old = torch.tensor(GIVEN.advantage)[:, None], torch.tensor(OLD_VALUE)
    ratio = torch.exp(logp - torch.tensor(GIVEN.old))
    first, second = -advantage * ratio, -advantage * torch.clamp(ratio, 0.9, 1.1)
    now = torch.cat([torch.zeros(8, 1), value[:, :-1]], 1)
    bound = torch.minimum(torch.maximum(now, old - 0.5), old + 0.5)
    errors = [torch.square(x - torch.tensor(RETURNS)) for x in (now, bound)]
    policy, critic = torch.maximum(first, second)[keep].mean(), 0.5 * torch.maximum(*errors)[keep].mean()
    (policy + 0.3 * critic).backward()

    scores, batch = written.rows(GIVEN)
    batch |= {"old_value": lay(OLD_VALUE), "returns": lay(RETURNS)}

    def fn(logp, value):
        losses, metrics = ROW.fn(
            config, {"policy": scores["policy"] | {"logp": logp}, "value": {"value": value}}, batch, {}
        )
        return sum(terms.values(losses).values()), terms.values(metrics)

    given = scores["policy"]["logp"], lay(VALUE)
    (total, metrics), grads = jax.value_and_grad(fn, (0, 1), has_aux=True)(*given)
    assert float(total) == pytest.approx((policy + 0.3 * critic).item(), rel=1e-5)
    for found, leaf in zip(grads, (logp, value), strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(completions.back(np.asarray(found), GIVEN), leaf.grad, rtol=2e-4, atol=1e-7)
    log_ratio = (logp.detach() - torch.tensor(GIVEN.old))[keep]
    want = {
        "policy/approxkl_avg": 0.5 * torch.square(log_ratio).mean(),
        "policy/clipfrac_avg": (second > first)[keep].float().mean(),
        "policy/entropy_avg": torch.tensor(GIVEN.entropy)[keep].mean(),
        "loss/policy_avg": policy,
        "loss/value_avg": critic,
        "val/clipfrac_avg": (errors[1] > errors[0])[keep].float().mean(),
        "val/ratio": ratio[keep].mean(),
        "val/ratio_var": ratio[keep].var(correction=0),
    }
    assert {n: float(x) for n, x in metrics.items()} == pytest.approx({n: x.item() for n, x in want.items()}, rel=1e-4)
    assert 0 < want["policy/clipfrac_avg"] < 1 and 0 < want["val/clipfrac_avg"] < 1


def test_what_is_refused_and_asked_for():
    with pytest.raises(ValueError, match=r"objective.lam: got 1.5; expected from 0 to 1"):
        PPO(lam=1.5)
    with pytest.raises(ValueError, match=r"objective.kl_coef: got 0 with kl_target"):
        PPO(kl_coef=0, kl_target=6.0)
    assert ROW.asked(PPO()) == (("logp",), ("entropy",), ("policy", "value"), (), ("old_logp", "ref_logp", "value"))
