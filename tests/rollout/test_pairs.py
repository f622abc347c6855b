"""Pairs of a rollout: which completions they are of, and how they lie in rows."""

import numpy as np

from jaxft.data import Prompt
from jaxft.rollout import layout, pairs
from jaxft.rollout.generate import Completion

NAN = np.nan


def test_the_best_and_the_worst_of_what_is_known():
    reward = np.array([1, 3, 3, 0, NAN, 2, NAN, 1, 5, 5, 5, 5, NAN, NAN, NAN, 4], np.float32)
    found = pairs.of(reward, 4)
    assert found.exists.tolist() == [True, True, False, False]
    assert found.best[:2].tolist() == [1, 5] and found.worst[:2].tolist() == [3, 7]
    assert [found.side(row) for row in (0, 1, 3, 5, 7, 8)] == ["", "chosen", "rejected", "chosen", "rejected", ""]


def test_a_row_holds_the_chosen_and_then_the_rejected():
    """Two prompts with three completions each, after two positions of a learnt prompt; the second has no pair."""
    asked = [Prompt("a", (1, 2), "", "", task=1)] * 3 + [Prompt("b", (3,), "", "")] * 3
    made = [Completion([10 + i] * (i + 1), [0.0] * (i + 1), True, []) for i in range(6)]
    rollout = layout.arrays(asked, made, samples=3, pad_id=99, reserved=2)
    rows = pairs.rows(rollout, pairs.of(np.array([0, 1, 5, 2, 2, 2], np.float32), 3), 99)
    assert {name: value.shape for name, value in rows.items()} == {
        **dict.fromkeys(("tokens", "positions", "segments", "loss_mask", "task_ids"), (2, 16)), "sequence_mask": (2, 2)
    }  # fmt: skip
    assert rows["tokens"][0, :12].tolist() == [99, 99, 1, 2, 12, 12, 12, 99, 99, 1, 2, 10]
    assert rows["positions"][0, :13].tolist() == [*range(7), *range(5), 0]
    assert rows["segments"][0, :13].tolist() == [1] * 7 + [2] * 5 + [0]
    assert np.flatnonzero(rows["loss_mask"][0]).tolist() == [4, 5, 6, 11]
    assert rows["task_ids"][0, :12].tolist() == [1] * 12
    assert rows["sequence_mask"].tolist() == [[True, True], [False, False]]
    assert not rows["loss_mask"][1].any() and not rows["segments"][1].any() and set(rows["tokens"][1]) == {99}
