"""Advantages by hand: groups of any size, and tokens with others between them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft.objectives import advantages, ratios, rollouts
from jaxft.rollout import source

NAN = np.nan


def test_groups_of_any_size_in_any_order():
    """Group 0: 1, 3 and one of which nothing is known; 2: 5 alone; 1: 2, 2 and 8."""
    reward, group = jnp.array([1.0, 2, 5, 3, NAN, 2, 8]), jnp.array([0, 1, 2, 0, 0, 1, 1])
    np.testing.assert_allclose(advantages.group_mean(reward, group), [2, 4, 5, 2, 2, 4, 4])
    np.testing.assert_allclose(advantages.leave_one_out(reward, group), [-2, -3, NAN, 2, NAN, -3, 6])
    want = [2**0.5, 12**0.5, 0, 2**0.5, 2**0.5, 12**0.5, 12**0.5]
    np.testing.assert_allclose(advantages.group_deviation(reward, group), want, rtol=1e-6)


def test_a_reward_that_is_only_watched_says_nothing_of_what_is_known():
    """Weights 2, 0 and 1, on the device and on the host: of the second and last completion only what is watched says
    anything, and nothing does."""
    reward, weight = np.array([[1.0, 5, 3], [NAN, 5, NAN], [NAN, 5, 3], [NAN] * 3], np.float32), [2.0, 0.0, 1.0]
    want = [5, NAN, 3, NAN]
    np.testing.assert_array_equal(rollouts.combined(jnp.array(reward), jnp.array(weight)), want)
    np.testing.assert_array_equal(source.combined(reward, weight), want)


def test_generalised_by_hand():
    """γ = 1/2, λ = 1/2: from the last token back, δ = 8 - 2 = 6 and A = 6; δ = 0 + 1 - 4 = -3, A = -3 + 6/4 = -1.5;
    δ = 1 + 2 - 2 = 1, A = 1 - 1.5/4 = 0.625. The token that is not the policy's is as if it were not there."""
    keep = jnp.array([[False, True, True, False, True, False]])
    reward, value = jnp.array([[9.0, 1, 0, 9, 8, 9]]), jnp.array([[7.0, 2, 4, 7, 2, 7]])
    advantage, returns = advantages.generalised(reward, value, keep, 0.5, 0.5)
    np.testing.assert_allclose(advantage, [[0, 0.625, -1.5, 0, 6, 0]])
    np.testing.assert_allclose(returns, [[0, 2.625, 2.5, 0, 8, 0]])
    np.testing.assert_allclose(advantages.discounted(reward, keep, 0.5), [[0, 3, 4, 0, 8, 0]])
    np.testing.assert_allclose(advantages.at_last(jnp.array([3.0]), keep), [[0, 0, 0, 0, 3, 0]])


@pytest.mark.parametrize("shift", [True, False])
def test_whitened_is_over_what_is_kept(shift):
    rng = np.random.default_rng(0)
    x, keep = rng.normal(3, 2, (4, 5)).astype(np.float32), rng.random((4, 5)) < 0.6
    kept = torch.tensor(x[keep])
    want = (kept - kept.mean()) * torch.rsqrt(kept.var() + 1e-8) + (0 if shift else kept.mean())
    found = np.asarray(advantages.whitened(jnp.where(keep, x, NAN), jnp.asarray(keep), shift))
    np.testing.assert_allclose(found[keep], want, rtol=1e-5)
    assert not np.any(found[~keep])


def test_one_token_or_none_is_whitened_without_harm():
    for keep in ([False, False], [True, False]):
        assert np.all(np.asarray(advantages.whitened(jnp.array([2.0, NAN]), jnp.array(keep))) == 0)


def test_estimators_of_the_divergence():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p, q) = (log 2 + log 2/3)/2, which k1 and k3 are on average."""
    logp, ref = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    kl = (np.log(2) + np.log(2 / 3)) / 2
    each = {kind: np.asarray(ratios.divergence(kind, logp, ref)) for kind in ("k1", "k2", "k3")}
    np.testing.assert_allclose(each["k1"], [np.log(2), np.log(2 / 3)], rtol=1e-6)
    np.testing.assert_allclose(each["k2"], [np.log(2) ** 2 / 2, np.log(2 / 3) ** 2 / 2], rtol=1e-6)
    assert each["k1"].mean() == pytest.approx(kl) and each["k3"].mean() == pytest.approx(kl)
    assert np.all(each["k3"] > 0)
