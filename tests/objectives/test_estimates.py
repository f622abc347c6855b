"""Advantages of whole rollouts: trl's numbers on the same rewards and log-probs."""

import jax
import numpy as np
import pytest

from jaxft.objectives import GRPO, OBJECTIVES, RLOO, terms
from tests.objectives import trl_online, written

SAMPLES = 4
NAN = np.nan
REWARD = np.array([
    [1, 0.5], [0, NAN], [NAN, 2], [1, 0],  # one function said nothing here and there
    [1, 1], [1, 1], [1, 1], [1, 1],
    [NAN, NAN], [0.25, 1], [0, -1], [2, 0.5],  # of one nothing is known
    [NAN, NAN], [NAN, NAN], [NAN, 1], [NAN, NAN],  # of one alone something is
], np.float32)  # fmt: skip
WEIGHT = [1.0, 0.5]
FINISHED = np.arange(16) % 3 > 0


def estimated(row, config, given, finished=FINISHED):
    rollout = written.rollout(given, REWARD, SAMPLES, WEIGHT, finished)
    added, metrics, running = jax.jit(row.estimate, static_argnums=0)(config, rollout, row.running(config))
    return rollout | added, {name: float(x) for name, x in terms.values(metrics).items()}, running


def same(row, config, given, cls, **settings):
    """Compares advantages, masks and metrics with trl's."""
    settings |= {n: getattr(config, n) for n in ("beta", "mask_truncated_completions")}
    settings["reward_weights"] = trl_online.torch.tensor(WEIGHT)
    want, counts, want_metrics, _ = trl_online.judged(given, REWARD, SAMPLES, FINISHED, cls, **settings)
    found, metrics, _ = estimated(row, config, given)
    mask, advantage = np.asarray(found["loss_mask"]), np.asarray(found["advantage"])
    np.testing.assert_array_equal(mask.sum(1), counts)
    np.testing.assert_allclose(advantage, np.where(mask, want[:, None], 0), rtol=2e-5, atol=1e-6)
    assert np.abs(want).max() > 0.5 and want[8] == 0
    assert {n for n in want_metrics if not n.startswith(("sampling", "completions"))} <= set(metrics)
    for name, number in metrics.items():
        if name in want_metrics:
            assert number == pytest.approx(want_metrics[name], rel=2e-5, abs=1e-6), name
    return metrics, want_metrics


GIVEN = written.draw(16, 3, odd=False)
GRPOS = [
    ("token_truncate", {"scale_rewards": "group"}),
    ("token_mask", {"scale_rewards": "batch", "mask_truncated_completions": True}),
    ("sequence_truncate", {"scale_rewards": "none"}),
    ("sequence_mask", {"multi_objective_aggregation": "normalize_then_sum"}),
]


@pytest.mark.parametrize("mode, settings", GRPOS)
def test_grpo(mode, settings):
    config = GRPO(
        beta=0.1, importance_sampling_correction=mode, importance_sampling_clip_max=1.2,
        importance_sampling_clip_min=0.9, **settings,
    )  # fmt: skip
    theirs = {
        "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.2, "vllm_importance_sampling_clip_min": 0.9,
    } | {n: getattr(config, n) for n in ("scale_rewards", "multi_objective_aggregation")}  # fmt: skip
    metrics, want = same(OBJECTIVES["grpo"], config, GIVEN, trl_online.GRPOTrainer, **theirs)
    assert {name for name in want if name.startswith("sampling")} <= set(metrics)


@pytest.mark.parametrize(
    "config",
    [
        RLOO(),
        RLOO(beta=0.3, normalize_advantages=True, mask_truncated_completions=True),
        RLOO(reward_clip_range=(0, 1)),
    ],
)
def test_rloo(config):
    theirs = {n: getattr(config, n) for n in ("normalize_advantages", "reward_clip_range")}
    same(OBJECTIVES["rloo"], config, GIVEN, trl_online.RLOOTrainer, **theirs)
