"""Choosing tokens: filters and penalties as `transformers` has them, draws from the distribution that is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from jaxft.rollout import sample
from jaxft.rollout.generate import GenerateConfig

V = 300


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"temperature": 0.5}, [hf.TemperatureLogitsWarper(0.5)]),
        ({"top_k": 7}, [hf.TopKLogitsWarper(7)]),
        ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
        ({"top_p": 0.01}, [hf.TopPLogitsWarper(0.01)]),
        ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.7, "top_k": 40, "top_p": 0.7, "min_p": 0.05},
            [
                hf.TemperatureLogitsWarper(1.7), hf.TopKLogitsWarper(40),
                hf.TopPLogitsWarper(0.7), hf.MinPLogitsWarper(0.05),
            ],
        ),
        ({"top_k": 1000}, [hf.TopKLogitsWarper(1000)]),
    ],
)  # fmt: skip
def test_filters_are_those_of_transformers(settings, processors):
    config, logits = GenerateConfig(**{"temperature": 1.0, **settings}), drawn(0, 5, V)
    expected = torch.as_tensor(logits)
    for processor in processors:
        expected = processor(torch.zeros(5, 1, dtype=torch.long), expected)
    got = sample.filtered(config.sampling, config.knobs, jnp.asarray(logits))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_penalties():
    """Repetition as in `transformers`; presence and frequency of what was generated alone, by hand."""
    logits, prompt, made = drawn(1, 2, V), np.array([[3, 5], [7, 7]]), np.array([[9, 9, 5], [1, 2, 3]])
    occurred, count = np.zeros((2, V), bool), np.zeros((2, V), np.int32)
    for row in range(2):
        occurred[row, prompt[row]] = True
        np.add.at(count[row], made[row], 1)
    own = GenerateConfig(repetition_penalty=1.3)
    got = sample.penalised(own.knobs, jnp.asarray(logits), jnp.asarray(occurred), jnp.asarray(count))
    both = torch.as_tensor(np.concatenate([prompt, made], 1))
    expected = hf.RepetitionPenaltyLogitsProcessor(1.3)(both, torch.as_tensor(logits))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)
    own = GenerateConfig(presence_penalty=0.5, frequency_penalty=0.25)
    got = sample.penalised(own.knobs, jnp.asarray(logits), jnp.asarray(occurred), jnp.asarray(count))
    np.testing.assert_allclose(got, logits - 0.5 * (count > 0) - 0.25 * count, rtol=1e-5, atol=1e-6)


def test_draws_follow_the_distribution_and_the_log_probabilities_are_those():
    """20,000 rows of one distribution over 600 tokens, most filtered out: frequencies within five deviations."""
    logits = np.full((1, 600), -30.0, np.float32)
    logits[0, [3, 255, 256, 511, 599]] = np.log([0.1, 0.2, 0.3, 0.35, 0.05])
    rows = 20000
    config = GenerateConfig(temperature=1.0, top_k=4)
    keys = jax.random.split(jax.random.key(0), rows)
    made = sample.draw(config.sampling, config.knobs, keys, jnp.broadcast_to(jnp.asarray(logits), (rows, 600)))
    kept = {3: 0.1 / 0.95, 255: 0.2 / 0.95, 256: 0.3 / 0.95, 511: 0.35 / 0.95}
    assert set(np.unique(made.token_B)) == set(kept)
    for token, p in kept.items():
        here = np.asarray(made.token_B) == token
        assert abs(here.mean() - p) < 5 * np.sqrt(p * (1 - p) / rows)
        np.testing.assert_allclose(np.asarray(made.logp_B)[here], np.log(p), atol=1e-5)
        np.testing.assert_allclose(np.asarray(made.policy_logp_B)[here], logits[0, token], atol=1e-4)


def test_a_draw_is_never_of_a_token_without_probability():
    """Even where the uniform number is next to 1, and where all that is left is the last token of a block."""
    upto = jnp.asarray([[0.0, 0.5, 0.5, 1.0, 1.0]], jnp.float32)
    for u, at in ((0.0, 1), (0.49999, 1), (0.5, 3), (0.99999994, 3), (1.0, 3)):
        assert sample._passed(upto, jnp.asarray([u], jnp.float32))[0].tolist() == [at]


def test_the_least_logit_is_exact():
    x = jnp.asarray([[-0.0, 0.0, -1.5, 3.0, 3.0, -jnp.inf, 1e-40, -2e30]], jnp.float32)
    ordered = np.sort(np.asarray(x[0]))[::-1]
    for k in range(1, 9):
        found = sample.least(x, lambda keep, k=k: jnp.sum(keep, -1) >= k)
        assert found[0] == ordered[k - 1]
