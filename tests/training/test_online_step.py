"""Objectives of online RL through the step: a rollout estimated, cut into micro-batches, and a value model that trains
beside the policy on the same base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import tree
from jaxft.objectives import GRPO, OBJECTIVES, PPO, terms
from jaxft.training import optim, state, step
from jaxft.training.config import OptimConfig
from tests.training import tiny

CONFIGS = {
    "grpo": GRPO(
        beta=0.1, top_entropy_quantile=0.5, entropy_coef=0.1, use_adaptive_entropy=True,
        importance_sampling_correction="token_truncate",
    ),
    "ppo": PPO(kl_target=1.0),
}  # fmt: skip
PARTIAL = ("clip_ratio/low_min", "clip_ratio/high_max", "val/ratio_var")
"""Metrics of each micro-batch by itself."""


def score(view, params, batch, key=None):
    """The tiny model's; its value model sees the same tokens with a scalar head of its own."""
    assert ("score" in params) == (view == "value") and terms.CRITIC not in params
    said = tiny.score(view, params, batch, key)
    if view == "value":
        return {"value": jnp.tanh(said["logp"]) * params["score"]}
    return said | {name: -said["logp"] * jnp.exp(said["logp"]) for name in ("entropy", "trained_entropy")}


def parts(critic):
    """(trainable, frozen): with a value model, adapters of its own on the policy's very arrays."""
    whole = tiny.params(jax.random.key(0))
    mask = tree.trainable_mask(whole)
    if critic:
        own = {**tiny.params(jax.random.key(1)), "head": whole["head"], "embed": whole["embed"]}
        whole["critic"] = own | {"score": jnp.float32(0.5)}
        mask["critic"] = tree.trainable_mask(own) | {"score": True}
    return tree.partition(whole, mask)


def rollout(seed, trainable, frozen):
    """Eight completions, two samples a prompt, scored by the policy as it is."""
    rng, rows = np.random.default_rng(seed), tiny.batch(seed)
    shape = rows["tokens"].shape
    params = tree.combine(trainable, frozen)
    actor = {name: part for name, part in params.items() if name != "critic"}
    said = jax.jit(score, static_argnums=0)
    old = said("policy", actor, rows)["logp"]
    more = {
        "sequence_mask": np.ones((8, 1), bool), "group": np.arange(8, dtype=np.int32) // 2,
        "finished": rng.random(8) < 0.8, "reward": rng.normal(size=(8, 1)).astype(np.float32),
        "reward_weight": np.ones(1, np.float32), "old_logp": old,
        "ref_logp": old + rng.normal(0, 0.3, shape).astype(np.float32),
        "sampler_logp": old + rng.normal(0, 0.1, shape).astype(np.float32),
    }  # fmt: skip
    if "critic" in params:
        more["value"] = said("value", params["critic"], rows)["value"]
    return rows | more


def batch_of(row, config, seed, trainable, frozen):
    whole = rollout(seed, trainable, frozen)
    added, metrics, running = jax.jit(row.estimate, static_argnums=0)(config, whole, row.running(config))
    apart = ("group", "finished", "reward", "reward_weight", "value")  # of the rollout, not of the step
    return {n: x for n, x in (whole | added).items() if n not in apart}, metrics, running


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_in_parts_is_the_step_of_the_whole_batch(name):
    """Two steps on one rollout: the policy has not changed before the first, and has before the second."""
    row, config, ends = OBJECTIVES[name], CONFIGS[name], []
    for count in (1, 4):
        trainable, frozen = parts(name == "ppo")
        batch, told, _ = batch_of(row, config, 0, trainable, frozen)
        optimizer = optim.make(OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0), trainable, 10)
        now = state.create(trainable, optimizer, jax.random.key(1), carry=row.carry(config))
        run, each = step.make_step(row, config, score, optimizer), []
        for _ in range(2):
            now, metrics = run(now, frozen, tiny.micro(batch, count))
            each.append({n: float(x) for n, x in metrics.items() if n not in PARTIAL})
        ends.append((now.trainable, now.carry, each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5, atol=1e-5), *ends)
    first, second = each
    assert not any(first[n] for n in first if "clip" in n) and first["skipped"] == second["skipped"] == 0
    assert all(np.isfinite(float(x)) for x in terms.values(told).values())
    if name == "ppo":
        assert first["policy/approxkl_avg"] < 1e-10 < second["policy/approxkl_avg"]
        assert first["val/ratio"] == pytest.approx(1, rel=1e-6)


def test_the_value_model_trains_on_the_bases_own_arrays():
    """One step moves every trainable array of both models, and nothing of the base, which they share."""
    trainable, frozen = parts(True)
    assert frozen["critic"]["head"] is frozen["head"]
    row, config = OBJECTIVES["ppo"], CONFIGS["ppo"]
    batch, _, _ = batch_of(row, config, 0, trainable, frozen)
    optimizer = optim.make(OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0), trainable, 10)
    now = state.create(trainable, optimizer, jax.random.key(1), carry=row.carry(config))
    now, metrics = step.make_step(row, config, score, optimizer)(now, frozen, tiny.micro(batch, 4))
    assert {"loss/policy", "loss/value"} <= set(metrics)
    pairs = zip(jax.tree.leaves(trainable), jax.tree.leaves(now.trainable), strict=True)
    assert all(np.any(np.asarray(before) != np.asarray(after)) for before, after in pairs)
    assert "critic" in now.trainable and len(jax.tree.leaves(now.trainable["critic"])) == 3
