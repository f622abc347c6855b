"""Log-probabilities that a reference gives to every token of a data set, found once before training.

A folder holds, for each part of the data (`train`, `held_out`), `<part>.npy`, float32 of as many numbers as
`Examples.tokens`, and `<part>.json`, which says what they are of and is written last: a part without it was not
finished and is made again. What was made of anything else is refused by name.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxft.data import pack
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.examples import Examples
from jaxft.data.retold import Beside

FORMAT = 1
WORDS = {
    "model": "another reference, or changed weights",
    "examples": "other data, or another template, tokenizer or loss mask",
    "window": "another data.max_length",
    "reserved": "a learnt prompt of another length",
}


@dataclass(frozen=True)
class About:
    """What the numbers are of."""

    model: str
    """Fingerprint of the reference's parameters."""
    examples: str
    """`Examples.digest` of the data."""
    window: int
    """Tokens of the longest sequence that it read."""
    reserved: int = 0
    """Positions of its learnt prompt before each sequence."""


def about(examples: Examples, model: str, max_length: int, reserved: int = 0) -> About:
    """What would be stored of these examples, cut at ``max_length`` positions."""
    window = min(max_length - reserved, int(np.diff(examples.offsets).max(initial=1)))
    return About(model, examples.digest(), window, reserved)


@dataclass(frozen=True)
class Known:
    """The log-probability of each token of `Examples.tokens`, nats; 0 where nothing precedes it."""

    logp: np.ndarray

    def beside(self, own: Examples, plan: pack.Plan, room: int, config: DataConfig) -> Beside:
        """`ref_logp` float32 `[rows, T]` of a batch's tokens."""
        if len(self.logp) != len(own.tokens):
            got, expected = f"log-probabilities of {len(self.logp):,} tokens", f"of {len(own.tokens):,}"
            raise DataError("", "reference", got, expected, "Find them again.")

        def arrays(rows: pack.Epoch, first: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
            out = np.zeros(shape, np.float32)
            for row, at, start, stop in pack.places(rows, first, shape[0], plan.reserved):
                out[row, at : at + stop - start] = self.logp[start:stop]
            return {"ref_logp": out}

        return arrays


def read(folder: Path, part: str, of: About) -> Known | None:
    """What is stored of a part; None if it is not there yet. Raises DataError for what is of anything else."""
    file = folder / f"{part}.json"
    if not file.exists():
        return None
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if said.pop("format") != FORMAT:
            raise ValueError("another format")
        own = About(**said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "It is damaged, or of another version: delete it."
        raise DataError(str(file), "", f"what cannot be read ({error})", f"format {FORMAT}", remedy) from None
    for name, expected in dataclasses.asdict(of).items():
        got = dataclasses.asdict(own)[name]
        if got != expected:
            remedy = f"It was made of {WORDS[name]}: choose another reference.stored, or delete the folder."
            raise DataError(str(file), name, repr(got), repr(expected), remedy)
    array = file.with_suffix(".npy")
    try:
        return Known(np.load(array, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        remedy = f"It is damaged: delete {file.name}, and it is made again."
        raise DataError(str(array), "", f"what cannot be read ({error})", "a numpy file", remedy) from None


def write(folder: Path, part: str, of: About, logp: np.ndarray) -> None:
    """Writes a part, at once or not at all. Raises DataError for a folder that holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    other = [p.name for p in folder.iterdir() if p.suffix not in (".npy", ".json", ".partial")]
    if other:
        got, remedy = f"other files ({other[0]})", "Choose another folder."
        raise DataError(str(folder), "", got, "a new folder, or one of such numbers", remedy)
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(of)}, indent=1).encode()
    for name, put in ((f"{part}.npy", lambda f: np.save(f, logp.astype(np.float32))), (f"{part}.json", None)):
        partial = folder / f"{name}.partial"
        with partial.open("wb") as file:
            file.write(text) if put is None else put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / name)
