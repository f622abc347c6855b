"""On-policy distillation: batches of what the student wrote, or of the data.

Agarwal et al. 2024 (arXiv:2306.13649), algorithm 1: with probability ``fraction`` the student's completions of prompts,
else completions that are given. It is drawn anew for each rollout, not for each batch, so that rollouts are used up.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.loader import Loader
from jaxft.rollout.source import Source


class Alternating:
    """Batches of a source and of a loader, for `prefetch.as_asked`; the cursor is that of both."""

    def __init__(self, loader: Loader, source: Source, fraction: float, seed: int = 0):
        """``fraction``: of the source's rollouts; between two draws, which are of ``seed``, come as many batches as a
        rollout has."""
        self.loader, self.source, self.fraction, self.seed = loader, source, fraction, seed
        self.drawn, self.left, self.own = 0, 0, False

    def next(self, state: Any) -> tuple[Any, dict[str, float]]:
        """The next batch; ``on_policy`` is 1 where the student wrote it, and 0 where the data have it."""
        if not self.left:
            self.own = bool(np.random.default_rng([self.seed, self.drawn]).random() < self.fraction)
            self.drawn, self.left = self.drawn + 1, self.source.minibatches
        self.left -= 1
        batch, metrics = self.source.next(state) if self.own else (next(self.loader), {})
        return batch, {**metrics, "on_policy": float(self.own)}

    def state(self) -> dict[str, Any]:
        """The cursor behind the last batch."""
        counts = {"drawn": self.drawn, "left": self.left, "own": self.own, "fraction": self.fraction}
        return {**counts, "data": self.loader.state(), "rollouts": self.source.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the batch at which ``state()`` was taken. Raises DataError for that of other data."""
        if state.get("fraction") != self.fraction:
            got = f"{state.get('fraction')!r} in the checkpoint and {self.fraction!r} now"
            remedy = "Resume with the settings of the run, or start a new run_dir."
            raise DataError("", "rollout.fraction", got, "the same", remedy)
        self.drawn, self.left, self.own = int(state["drawn"]), int(state["left"]), bool(state["own"])
        self.loader.restore(state["data"])
        self.source.restore(state["rollouts"])
