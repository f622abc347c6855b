"""Preference objectives in the step: parts of a batch are the batch, and where policy and reference agree the loss is
what arithmetic says."""

import math

import jax
import numpy as np
import pytest

from jaxft.objectives import BCO, DPO, KTO, OBJECTIVES
from jaxft.training import optim, state, step
from jaxft.training.config import OptimConfig
from tests.training import tiny


def rows(seed, count=8):
    """Two pairs of ragged sequences in a row, in some rows one; and a label each."""
    rng = np.random.default_rng(seed)
    length, sequences = 16, 4
    batch = {
        "tokens": rng.integers(0, tiny.VOCAB, (count, length)).astype(np.int32),
        "segments": np.zeros((count, length), np.int32),
        "loss_mask": np.zeros((count, length), bool),
        "sequence_mask": np.zeros((count, sequences), bool),
        "label": rng.random((count, sequences)) < 0.6,
    }
    for row in range(count):
        at = 0
        for sequence in range(4 if row % 3 else 2):
            end = at + int(rng.integers(2, 5))
            batch["segments"][row, at:end] = sequence + 1
            batch["loss_mask"][row, at + 1 : end] = True
            batch["sequence_mask"][row, sequence] = True
            at = end
    return batch


def batch(seed):
    beside = {f"kl_{name}": x for name, x in rows(seed + 100).items() if name != "label"}
    return rows(seed) | beside


def score(view, params, batch, key=None):
    said = tiny.score(view, params, batch, key)
    return {**said, "sum_p2": jax.lax.stop_gradient(0.2 + 0.5 * jax.numpy.exp(said["logp"]))}


CASES = [
    ("dpo", DPO(loss=("sigmoid", "sft"), loss_weights=(1.0, 0.3), ld_alpha=0.5), None),
    ("dpo", DPO(loss=("aot", "aot_unpaired"), label_smoothing=0.1), 2 * math.log(2)),
    ("dpo", DPO(loss="robust", use_weighting=True, ref_sync_steps=1), None),
    ("kto", KTO(undesirable_weight=1.0), 0.5),
    ("bco", BCO(), math.log(2)),
]


@pytest.mark.parametrize("name, config, first", CASES, ids=["mixed", "sorted", "weighed", "kto", "bco"])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(name, config, first):
    """Parameters, reference, running quantities and metrics after two steps, from a policy that is its reference."""
    row, ends = OBJECTIVES[name], []
    for parts in (1, 4):
        trainable, frozen = tiny.parts(jax.random.key(0))
        optimizer = optim.make(OptimConfig(lr=3e-2, schedule="constant", warmup_steps=0), trainable, 10)
        now = state.create(trainable, optimizer, jax.random.key(1), True, row.carry(config))
        run = step.make_step(row, config, score, optimizer)
        now, metrics = run(now, frozen, tiny.micro(batch(0), parts))
        if first is not None:
            np.testing.assert_allclose(metrics["loss"], first, rtol=1e-6)
        now, metrics = run(now, frozen, tiny.micro(batch(1), parts))
        assert metrics["rewards/chosen"] != 0 and metrics["skipped"] == 0
        ends.append((now.trainable, now.start, now.carry, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-6), *ends)
