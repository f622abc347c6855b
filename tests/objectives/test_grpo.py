"""GRPO and its family: trl's numbers and gradients on the same tensors, whatever the packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import GRPO, OBJECTIVES, terms
from tests.objectives import completions, trl_online, written
from tests.objectives.whole import annotated, part_of

ROW = OBJECTIVES["grpo"]
ESTIMATE = jax.jit(ROW.estimate, static_argnums=0)
LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo", "gmpo")
PLAIN = {"importance_sampling_correction": "none"}


def config_of(loss, **settings):
    return GRPO(loss=loss, **({"epsilon_high": 1.2} if loss == "cispo" else {}), **{**PLAIN, **settings})


def same(config, given, carry=None, made=None):
    """Compares loss, gradients and metrics with trl's; returns the carry and trl's trainer."""
    want, by_logp, by_entropy, want_metrics, made = trl_online.grpo(given, config, made)
    value, grads, metrics, carry = written.total(ROW, config, *written.rows(given), carry)
    assert float(value) == pytest.approx(want, rel=1e-5, abs=1e-7)
    for name, gradient in (("logp", by_logp), ("trained_entropy", by_entropy)):
        found = completions.back(np.asarray(grads[name]), given)
        np.testing.assert_allclose(found, gradient, rtol=2e-4, atol=1e-7, err_msg=name)
        assert not np.any(found[~given.completion])
    assert numbers(metrics) == pytest.approx(want_metrics, rel=2e-5, abs=1e-6)
    return carry, made


def numbers(metrics):
    return {name: float(x) for name, x in metrics.items()}


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradient_and_metrics_are_those_of_trl(loss):
    """Ratios of tokens and of sequences, with and without a reference; two sequences a row, with room for another."""
    for level in ("token", "sequence") if loss != "gmpo" else ("token",):
        for beta in (0.0, 0.3):
            config = config_of(loss, importance_sampling_level=level, beta=beta)
            same(config, written.draw(odd=loss != "gmpo"))


SETTINGS = [
    config_of("dapo", epsilon=0.1, epsilon_high=0.28, delta=1.2),
    config_of("grpo", epsilon=0.15, beta=0.2, use_bias_correction_kl=False),
    config_of("dr_grpo", max_completion_length=7),
    config_of("gmpo", epsilon=0.1, epsilon_high=0.2, beta=0.2),
    config_of("sapo", sapo_temperature_pos=0.7, sapo_temperature_neg=2.0),
    config_of("vespo", vespo_k_pos=1.0, vespo_lambda_pos=2.0, vespo_k_neg=1.5, vespo_lambda_neg=0.5),
    config_of("dapo", off_policy_mask_threshold=0.05),
    config_of("luspo", importance_sampling_level="sequence", off_policy_mask_threshold=0.02, beta=0.1),
    config_of("dapo", top_entropy_quantile=0.4, beta=0.1),
    config_of("gmpo", top_entropy_quantile=0.6),
    config_of("dapo", entropy_coef=0.3),
    config_of("grpo", entropy_coef=0.2, top_entropy_quantile=0.5, beta=0.1),
]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: c.loss)
def test_settings_are_those_of_trl(config):
    same(config, written.draw(seed=1, odd=config.loss != "gmpo"))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_correction_for_the_sampler_is_that_of_trl(mode):
    for loss, bounds in (("dapo", (1.1, None)), ("vespo", (1.2, 0.9)), ("grpo", (None, 0.95))):
        most, least = bounds
        config = config_of(
            loss, importance_sampling_correction=mode, importance_sampling_clip_max=most,
            importance_sampling_clip_min=least, off_policy_mask_threshold=0.1,
        )  # fmt: skip
        same(config, written.draw(seed=2))


def test_the_adaptive_entropy_weight_is_that_of_trl():
    """Four steps whose entropies are about the target: the weight moves after each, and acts only after low ones."""
    config = config_of("dapo", use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=1.0, entropy_coef_delta=0.06)
    carry, made, weights = ROW.carry(config), None, []
    for seed, scale in enumerate((0.5, 0.5, 2.0, 0.5)):
        given = written.draw(seed=seed)
        given = dataclasses.replace(given, entropy=(given.entropy * scale).astype(np.float32))
        carry, made = same(config, given, carry, made)
        weights.append(float(carry["entropy_coef"]))
    assert weights == pytest.approx([0.16, 0.22, 0.16, 0.22])


COUPLED = config_of(
    "dapo", top_entropy_quantile=0.5, use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=9.0, beta=0.1
)


@pytest.mark.parametrize("config", [COUPLED, config_of("grpo", beta=0.1), config_of("vespo"), config_of("dr_grpo")])
def test_packing_and_parts_change_nothing(config):
    """One, two or four sequences a row, and the rows of the batch one by one."""
    given, carry = written.draw(seed=3), ROW.carry(config) | ({"last_entropy": 0.0} if config is COUPLED else {})
    run = jax.jit(functools.partial(written.total, ROW, config))
    found = [run(*written.rows(given, n, room=n - 1), carry) for n in (1, 2, 4)]
    for value, _, metrics, _ in found[1:]:
        assert float(value) == pytest.approx(float(found[0][0]), rel=1e-5)
        assert numbers(metrics) == pytest.approx(numbers(found[0][2]), rel=1e-5, abs=1e-6)
    each = [completions.back(np.asarray(f[1]["logp"]), given, n) for f, n in zip(found, (1, 2, 4), strict=True)]
    np.testing.assert_allclose(each[1:], [each[0]] * 2, rtol=1e-5, atol=1e-8)

    scores, batch = written.rows(given)
    whole, after = annotated(ROW, config, scores, batch, carry)
    losses, metrics = {}, {}
    for row in range(4):
        part, more = part_of(ROW, config, scores, whole, after, row, row + 1)
        losses = terms.add(part, losses) if losses else part
        metrics = terms.add(more, metrics) if metrics else more
    assert float(sum(terms.values(losses).values())) == pytest.approx(float(found[0][0]), rel=1e-5)
    for name, mean in terms.values(metrics).items():
        if name not in ("clip_ratio/low_min", "clip_ratio/high_max"):  # of each part
            assert float(mean) == pytest.approx(float(found[0][2][name]), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("config", [COUPLED, *(config_of(loss) for loss in ("grpo", "luspo", "dr_grpo", "cispo"))])
def test_weights_depend_on_the_batch_alone(config):
    scores, batch = written.rows(written.draw(seed=4))
    zeros = jax.tree.map(jnp.zeros_like, scores)
    found = [ROW.fn(config, s, *annotated(ROW, config, s, batch, ROW.carry(config)))[0] for s in (scores, zeros)]
    assert len({tuple(float(mean.weight) for mean in losses.values()) for losses in found}) == 1


def test_by_hand():
    """Two prompts with two samples, rewards 1 and 0, and 2 and 2: A = ±(1/2)/(0.7071 + 1e-4) = ±0.70701, and 0. One
    token each, ratios 1.5, 1/2, 1.5 and 1, ε = 0.2: -1.2 A, -max(0.5, 0.8)·(-A) and zeros; a fourth of the sum."""
    ones = jnp.ones((4, 1))
    rollout = {
        "loss_mask": ones > 0, "segments": ones.astype(jnp.int32), "sequence_mask": ones > 0,
        "finished": ones[:, 0] > 0, "group": jnp.array([0, 0, 1, 1]), "reward": jnp.array([[1.0], [0], [2], [2]]),
        "reward_weight": jnp.ones(1), "old_logp": -ones, "sampler_logp": -ones,
    }  # fmt: skip
    added, metrics, _ = ESTIMATE(GRPO(), rollout, {})
    np.testing.assert_allclose(added["advantage"][:, 0], [0.70701, -0.70701, 0, 0], rtol=1e-4)
    assert float(terms.values(metrics)["frac_reward_zero_std"]) == 0.5
    logp = -ones + jnp.log(jnp.array([[1.5], [0.5], [1.5], [1.0]]))
    run = jax.jit(functools.partial(written.total, ROW, GRPO()))
    value, grads, metrics, _ = run({"policy": {"logp": logp}}, rollout | added)
    assert float(value) == pytest.approx((-1.2 + 0.8) * 0.70701 / 4, rel=1e-4)
    assert not np.any(grads["logp"])  # both are beyond the bound that their advantages push against
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.25


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_update_is_the_policy_gradient(loss):
    """The policy has not changed: no old log-probs are needed, ratios are 1, nothing is clipped, and the gradient is -A
    times that of a token's log-prob over the weight of the mean (of sapo and gmpo too)."""
    given = written.draw(seed=5, odd=False)
    scores, batch = written.rows(given)
    del batch["old_logp"]
    config = dataclasses.replace(config_of(loss), max_completion_length=6)
    _, grads, metrics, _ = written.total(ROW, config, scores, batch)
    keep, length = given.completion, given.completion.sum(1, keepdims=True)
    weight = {"grpo": 8 * length, "sapo": 8 * length, "gmpo": 8 * length, "dr_grpo": 8 * 6, "luspo": 8}
    want = np.where(keep, -given.advantage[:, None] / weight.get(loss, keep.sum()), 0)
    np.testing.assert_allclose(completions.back(np.asarray(grads["logp"]), given), want, rtol=1e-5, atol=1e-8)
    assert not any(number for name, number in metrics.items() if "clip" in name)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_divergence_in_the_reward(kind):
    """It is taken from the reward of each completion before those of a prompt are compared."""
    given, reward = written.draw(8, 6, odd=False), np.arange(8.0)[:, None]
    config = config_of("dapo", beta=0.5, kl_in="reward", kl_estimator=kind, scale_rewards="none")
    found, metrics, _ = ESTIMATE(config, written.rollout(given, reward, 4), {})
    d = given.old - given.ref
    kl = np.where(given.completion, {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) + d - 1}[kind], 0)
    gain = (reward[:, 0] - 0.5 * kl.sum(1)).reshape(2, 4)
    want = np.where(given.completion, (gain - gain.mean(1, keepdims=True)).reshape(8, 1), 0)
    advantage = completions.back(np.asarray(found["advantage"]), given, 1)
    np.testing.assert_allclose(advantage, want, rtol=1e-4, atol=1e-5)
    assert float(terms.values(metrics)["kl"]) == pytest.approx(kl.sum() / given.completion.sum(), rel=1e-4)
    scores, batch = written.rows(given)
    assert set(ROW.fn(config, scores, batch, {})[0]) == {"policy"}
    config = dataclasses.replace(config, baseline="leave_one_out")
    others, _, _ = ESTIMATE(config, written.rollout(given, reward, 4), {})
    back = completions.back(np.asarray(others["advantage"]), given, 1)
    np.testing.assert_allclose(back, want * 4 / 3, rtol=1e-4, atol=1e-5)  # G / (G - 1) times as far


def test_what_is_refused_and_asked_for():
    refused = {
        r"objective.epsilon_high: got None; expected for cispo": {"loss": "cispo"},
        r"objective.kl_in: got reward": {"kl_in": "reward"},
        r"objective.top_entropy_quantile: got 1.5": {"top_entropy_quantile": 1.5},
        r"objective.importance_sampling_clip_min: got 4.0": {"importance_sampling_clip_min": 4.0},
        r"objective.scale_rewards: got none": {
            "multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none",
        },
        r"objective.importance_sampling_level: got sequence": {
            "loss": "gmpo", "importance_sampling_level": "sequence"},
    }  # fmt: skip
    for message, settings in refused.items():
        with pytest.raises(ValueError, match=message):
            GRPO(**settings)
    assert ROW.asked(GRPO()) == (("logp",), ("entropy",), ("policy",), (), ("old_logp",))
    assert ROW.asked(GRPO(beta=0.1)).rollout_needs == ("old_logp", "ref_logp")
    assert ROW.asked(COUPLED)[:2] == (("logp", "trained_entropy"), ())
    assert ROW.annotation(GRPO()) is None and ROW.annotation(COUPLED) is not None
