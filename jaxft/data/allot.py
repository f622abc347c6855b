"""Which source each row of a batch is of, so that every source has its part at every moment of a run.

After n rows a source of part p has had between n p - 1 and n p + 1 of them, however small its part: of the sources that
are due, that one has its turn which would be late first (Tijdeman 1980, "The chairman assignment problem", Discrete
Mathematics 32). No dice are thrown, so a batch is a function of the parts and its number.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parts:
    """Parts that sum to 1, float64 [steps, sources], at some steps: straight lines between, the last one's after."""

    steps: tuple[int, ...]
    values: np.ndarray

    @classmethod
    def of(cls, weights: Mapping[int, Sequence[float]]) -> "Parts":
        """The parts of weights by step; before the first step they are its own."""
        values = np.array(list(weights.values()), np.float64)
        return cls(tuple(weights), values / values.sum(axis=1, keepdims=True))

    def at(self, batch: int) -> np.ndarray:
        """The parts in a batch, [sources]."""
        after = int(np.searchsorted(self.steps, batch, side="right"))
        if after in (0, len(self.steps)):
            return self.values[max(after - 1, 0)]
        low, high = self.steps[after - 1], self.steps[after]
        share = (batch - low) / (high - low)
        return self.values[after - 1] * (1 - share) + self.values[after] * share

    def before(self, batch: int) -> np.ndarray:
        """The sum of the parts in all batches before this one, [sources]: sums of straight lines."""
        edges = [0, *[step for step in self.steps if 0 < step < batch], batch]
        total = np.zeros(self.values.shape[1])
        for low, high in itertools.pairwise(edges):
            total += (high - low) * (self.at(low) + self.at(high - 1)) / 2
        return total


class Turns:
    """The source of every row, and how many rows of it came before.

    Counts are found from the start, or from the batch that was asked for last: 100,000 batches take seconds."""

    def __init__(self, parts: Parts, batch_rows: int):
        self.parts, self.batch_rows = parts, batch_rows
        self.sources = parts.values.shape[1]
        self._reached: tuple[int, tuple[int, ...]] = (0, (0,) * self.sources)

    def batch(self, number: int) -> tuple[list[int], tuple[int, ...]]:
        """The source of each row of a batch, and the rows that each source had before."""
        reached, counts = self._reached
        if reached > number:
            reached, counts = 0, (0,) * self.sources
        for between in range(reached, number):
            _, counts = self._allotted(between, counts)
        self._reached = (number, counts)
        return self._allotted(number, counts)[0], counts

    def _allotted(self, number: int, counts: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
        part, due = self.parts.at(number).tolist(), (self.parts.before(number) * self.batch_rows).tolist()
        had, chosen = list(counts), []
        if self.sources == 1:
            return [0] * self.batch_rows, (counts[0] + self.batch_rows,)
        slack = 1 / (2 * self.sources - 2)
        for _ in range(self.batch_rows):
            best, earliest = -1, float("inf")
            for i, share in enumerate(part):
                due[i] += share
                lack = due[i] - had[i]
                if lack < slack - 1e-9 or share == 0:
                    continue
                late = (1 - slack - lack) / share
                if late < earliest - 1e-9:
                    best, earliest = i, late
            best = best if best >= 0 else max(range(self.sources), key=lambda i: due[i] - had[i])
            had[best] += 1
            chosen.append(best)
        return chosen, tuple(had)
