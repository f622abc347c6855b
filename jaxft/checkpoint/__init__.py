"""Checkpoints: Hugging Face's formats in and out, and the state of a training run."""

from jaxft.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError"]
