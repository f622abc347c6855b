"""The `checkpoint` section."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int | None = 200
    """Steps between checkpoints. null: only at the end and when the run is interrupted."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep."""
    keep_best: int = 1
    """How many of the best, by ``eval.metric``, to keep besides; one is saved whenever it improves. 0: none."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""

    def __post_init__(self) -> None:
        for field, least in (("every", 1), ("keep_last", 0), ("keep_best", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"checkpoint.{field}: got {value}; expected at least {least}")
