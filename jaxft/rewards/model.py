"""A reward model's score as a reward: what it says of the prompt with the completion, as it was trained to read them.

The command line loads the model: the policy's own base where the reward model is an adapter on that, else a model of
its own.
"""

from dataclasses import dataclass
from typing import Literal

from jaxft.rewards.settings import Function, Weighted


@dataclass(frozen=True, kw_only=True)
class RewardModel(Weighted):
    """The score of a reward model (`objective.name: reward` trains one)."""

    path: str
    """The folder of its run, of its adapter or of the whole model, or a hub id. An adapter on the policy's own base is
    put on that, and costs no second model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantize: Literal["none", "nf4", "fp4", "int8", "fp8"] = "none"
    """Few bits for the weights of a model of its own."""
    batch: int = 32
    """Completions scored together."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch: got {self.batch}; expected at least 1")


def make(config: RewardModel) -> Function:
    """Raises ValueError: only the command line loads models."""
    raise ValueError(f"path: got {config.path}, a reward model, which only the command line loads (jaxft train)")
