"""Objectives: pure functions from scores (log-probabilities and what else a loss asks for) to sums and weights.

`OBJECTIVES` is the literal table: an objective is one function, one line here, and a test with hand arithmetic.
"""

from jaxft.objectives import distil, sft
from jaxft.objectives.distil import Distil
from jaxft.objectives.sft import SFT
from jaxft.objectives.terms import Mean, Objective

OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(config=SFT, fn=sft.sft, needs=("logp",), reports=("correct", "entropy")),
    "distil": Objective(
        config=Distil, fn=distil.distil, needs=distil.needs, reports=distil.reports, views=distil.views
    ),
}

__all__ = ["OBJECTIVES", "SFT", "Distil", "Mean", "Objective"]
