"""Pairs of a rollout's completions: of each prompt's, the one that is judged best and the one that is judged worst."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxft.rollout import layout


class Pairs(NamedTuple):
    """A pair for each prompt, as rows of the rollout."""

    best: np.ndarray
    """int[P]."""
    worst: np.ndarray
    """int[P]."""
    exists: np.ndarray
    """bool[P]: their rewards differ. Where all are the same there is nothing to prefer."""

    def side(self, row: int) -> str:
        """What a row of the rollout is in its pair: chosen, rejected, or nothing."""
        for name, rows in (("chosen", self.best), ("rejected", self.worst)):
            if row in rows[self.exists]:
                return name
        return ""


def of(reward: np.ndarray, samples: int) -> Pairs:
    """The first of the best and the first of the worst of each group.

    reward: float32[N], of N / samples groups after each other; NaN where nothing is known, which is never chosen."""
    groups = reward.reshape(-1, samples)
    first = np.arange(len(groups)) * samples
    best = np.argmax(np.where(np.isnan(groups), -np.inf, groups), axis=1)
    worst = np.argmin(np.where(np.isnan(groups), np.inf, groups), axis=1)
    high, low = (np.take_along_axis(groups, at[:, None], axis=1)[:, 0] for at in (best, worst))
    return Pairs(first + best, first + worst, high > low)


def rows(rollout: Mapping[str, np.ndarray], found: Pairs, pad_id: int, multiple: int = 1) -> dict[str, np.ndarray]:
    """A row for each pair, the chosen before the rejected, as a loader lays pairs out (`data.Loader`).

    rollout: see `layout.arrays`. A pair that does not exist is an empty row. Returns tokens, positions, segments (1 of
    the chosen, 2 of the rejected, 0 in padding) int32[P, W]; loss_mask bool[P, W]; sequence_mask bool[P, 2]; and
    task_ids int32[P, W] if the rollout has them."""
    lengths = (rollout["segments"] > 0).sum(axis=1)
    most = int((lengths[found.best] + lengths[found.worst]).max())
    shape = (len(found.best), layout.width(most, multiple))
    names = [name for name in ("tokens", "positions", "loss_mask", "task_ids") if name in rollout]
    made = {name: np.full(shape, pad_id if name == "tokens" else 0, rollout[name].dtype) for name in names}
    made["segments"] = np.zeros(shape, np.int32)
    made["sequence_mask"] = np.repeat(found.exists[:, None], 2, axis=1)
    for pair in np.flatnonzero(found.exists):
        begin = 0
        for number, row in enumerate((found.best[pair], found.worst[pair]), 1):
            end = begin + lengths[row]
            for name in names:
                made[name][pair, begin:end] = rollout[name][row, : lengths[row]]
            made["segments"][pair, begin:end] = number
            begin = end
    return made
