"""What the members of a sweep reached: each one's own `metrics.jsonl`, and the few numbers the loop needs of all.

A member's lines are those of a run of its own. Nothing of it is in a checkpoint: a run that goes on drops the lines
beyond the step it goes on from, and counts on from what they say.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.training import by_source, sinks
from jaxft.training import evaluate as evaluate_
from jaxft.training.config import EvalConfig
from jaxft.training.evaluate import Evaluator
from jaxft.training.sinks import Sink
from jaxft.training.state import TrainState

Each = Callable[[int, TrainState], Sequence[Mapping[str, float]]]
"""``(step, state) -> metrics`` of each member."""


class Ledger:
    """Writes to the members' folders."""

    def __init__(self, folders: Sequence[Path], every: int, last: int):
        """``every``: steps between lines; ``last``: the run's last step, which always has one."""
        self.folders, self.every, self.last = folders, every, last
        self.sinks: list[Sink] = []
        self.skipped: list[int] = []

    def read(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Takes in a step's metrics, [members] each but for ``tokens``; returns the means of those that are finite.

        ``skipped`` is 1 if no member took the step: a sweep goes on as long as one of its members does."""
        self._open(step)
        columns = {name: np.asarray(values, float) for name, values in metrics.items()}
        tokens = float(columns.pop("tokens"))
        for index, sink in enumerate(self.sinks):
            values = by_source.present({name: float(column[index]) for name, column in columns.items()})
            self.skipped[index] += int(values["skipped"])
            if step % self.every == 0 or step == self.last or values["skipped"]:
                sink.write(step, values | {"skipped": self.skipped[index]})
        means = {name: _mean(column) for name, column in columns.items()}
        return means | {"tokens": tokens, "skipped": float(columns["skipped"].min())}

    def evaluator(self, parts: Sequence[Each], config: EvalConfig) -> Evaluator:
        """Evaluates all members, writes what each one reached, and returns the best one's metrics."""

        def evaluate(step: int, state: TrainState) -> Mapping[str, float]:
            self._open(step + 1)
            columns = zip(*(part(step, state) for part in parts), strict=True)
            found = [{name: value for part in column for name, value in part.items()} for column in columns]
            for sink, values in zip(self.sinks, found, strict=True):
                sink.write(step, {f"eval_{name}": value for name, value in values.items()})
            return min(found, key=lambda values: evaluate_.cost(config, values))

        return evaluate

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def _open(self, step: int) -> None:
        """Before the first line, of step ``step``: drops that step's and all later ones of an earlier run."""
        if not self.sinks:
            self.sinks = [sinks.jsonl(folder / sinks.FILE, step - 1) for folder in self.folders]
            self.skipped = [_skipped(folder) for folder in self.folders]


def _skipped(folder: Path) -> int:
    """Steps skipped so far, by the last line that tells."""
    return next((int(row["skipped"]) for row in reversed(sinks.read(folder)) if "skipped" in row), 0)


def _mean(column: np.ndarray) -> float:
    finite = column[np.isfinite(column)]
    return float(finite.mean()) if finite.size else math.nan
