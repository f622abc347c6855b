"""Checkpoints of the tiny models, to be damaged: their tensors as a dict of numpy arrays, and back."""

import json
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors

from jaxft.checkpoint import hf


def read(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, by the reference reader."""
    out: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= safetensors.load_file(file)
    return out


def write(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replaces the weights of a checkpoint by one file of these tensors."""
    for file in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        file.unlink()
    safetensors.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, directory / hf.SINGLE)


def config(directory: Path, **changes: object) -> None:
    """Changes fields of config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
