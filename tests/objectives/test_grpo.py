"""GRPO and its family: trl's numbers and gradients on the same tensors, whatever the packing."""

import dataclasses

import numpy as np
import pytest

from jaxft.objectives import GRPO, OBJECTIVES
from tests.objectives import completions, trl_online, written

ROW = OBJECTIVES["grpo"]
LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo", "gmpo")
PLAIN = {"importance_sampling_correction": "none"}


def config_of(loss, **settings):
    return GRPO(loss=loss, **({"epsilon_high": 1.2} if loss == "cispo" else {}), **{**PLAIN, **settings})


def same(config, given, carry=None, made=None):
    """Compares loss, gradients and metrics with trl's; returns the carry and trl's trainer."""
    want, by_logp, by_entropy, want_metrics, made = trl_online.grpo(given, config, made)
    value, grads, metrics, carry = written.total(ROW, config, *written.rows(given), carry)
    assert value == pytest.approx(want, rel=1e-5, abs=1e-7)
    for name, gradient in (("logp", by_logp), ("trained_entropy", by_entropy)):
        found = completions.back(np.asarray(grads[name]), given)
        np.testing.assert_allclose(found, gradient, rtol=2e-4, atol=1e-7, err_msg=name)
        assert not np.any(found[~given.completion])
    assert set(metrics) == set(want_metrics)
    for name, number in metrics.items():
        assert number == pytest.approx(want_metrics[name], rel=2e-5, abs=1e-6), name
    return carry, made


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
