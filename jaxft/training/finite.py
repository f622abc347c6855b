"""What to do about losses and gradients that are not finite: count, and stop with a diagnosis.

The step itself has already left the parameters as they were (see `step`). One such step is bad luck; several in a row
mean that the run is broken, and going on would only burn time.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.checkpoint.cursor import shown


class NonFiniteError(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Watch:
    """Counts skipped steps in a row and keeps what is needed to say what happened."""

    def __init__(self, limit: int, streak: int = 0):
        self.limit, self.streak = limit, streak
        self.last: deque[str] = deque(maxlen=max(limit, 1))

    def see(self, step: int, metrics: Mapping[str, float], batch: Mapping[str, np.ndarray], cursor: Any) -> bool:
        """Takes in one step; True when the run should stop."""
        if not metrics["skipped"]:
            self.streak = 0
            self.last.clear()
            return False
        self.streak += 1
        self.last.append(_describe(step, metrics, batch, cursor))
        return self.streak >= self.limit

    def diagnosis(self, saved: str) -> str:
        """What happened, in which batches, and what to try. ``saved``: where the last good state is."""
        return "\n".join(
            [
                f"stopped: {self.streak} steps in a row had a loss or gradient that is not finite; none was applied.",
                *self.last,
                f"  The parameters are those before these steps. {saved}",
                "  What usually helps, in this order:",
                "  - from the first step on: model.dtype=float32 (float16 overflows), and a look at the rows with",
                "    `jaxft data CONFIG`;",
                "  - later: a lower optim.lr, a longer optim.warmup_steps, optim.clip_norm=1.0, in a new run_dir;",
                "  - always at the same batch, whatever the rate: a row of the data that breaks the model.",
            ]
        )


def _describe(step: int, metrics: Mapping[str, float], batch: Mapping[str, np.ndarray], cursor: Any) -> str:
    bad = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
    where = cursor["consumed"] if isinstance(cursor, Mapping) and "consumed" in cursor else shown(cursor)
    facts = [f"learning_rate {metrics['learning_rate']:.3g}", f"batch {where} of the data"]
    if "sequence_id" in batch:
        ids = sorted({int(i) for i in np.unique(batch["sequence_id"]) if i >= 0})
        facts.append(f"sequences {', '.join(map(str, ids[:16]))}{' ...' if len(ids) > 16 else ''}")
    if "loss_mask" in batch:
        facts.append(f"{int(batch['loss_mask'].sum())} target tokens")
    return f"  step {step}: {bad} ({'; '.join(facts)})"
