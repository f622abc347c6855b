"""What a teacher says of each token of a data set, on disk: its likeliest tokens and their log-probabilities.

A folder holds `topk.json` and the files `00000.npy`, `00001.npy`, ... The files are stretches of the data set's tokens
(`Examples.tokens`), one after the other; `starts` in `topk.json` says where each begins. A file is a numpy array
[tokens, K] of records (`id` int32, `logp` float16), little-endian and likeliest first: the K tokens that the teacher
finds likeliest in the place of that token, given what precedes it in its document. The first token of a document, which
nothing precedes, has zeros. Rows are read from the disk as they are needed (a memory map).

A file appears whole or not at all, so what was begun can be gone on with: the files that are missing are those left to
be made. Whatever the numbers depend on stands in `topk.json`, and a folder made of anything else is refused by name.
"""

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data import pack
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.examples import Examples
from jaxft.data.retold import Beside

ABOUT = "topk.json"
FORMAT = 1
TOKENS = 2**18  # of a file, at least, but for the last: at K = 64 it has 100 MB
RECORD = np.dtype([("id", "<i4"), ("logp", "<f2")])


@dataclass(frozen=True)
class About:
    """What stored log-probabilities are of."""

    teacher: str
    """Fingerprint of the model."""
    examples: str
    """`Examples.digest` of the data."""
    count: int
    """K: how many tokens are kept for each."""
    temperature: float
    """What the teacher's logits were divided by."""
    vocabulary: int
    """The ids from 0 that the teacher chose among."""
    window: int
    """Tokens of the longest document that the teacher read; longer examples were split into several."""


WORDS = {
    "teacher": "another teacher, or changed weights",
    "examples": "other data, or another template, tokenizer or loss mask",
    "count": "another number of tokens kept",
    "temperature": "another temperature",
    "vocabulary": "another vocabulary",
    "window": "another data.max_length",
}


def about(examples: Examples, teacher: str, count: int, temperature: float, vocabulary: int, max_length: int) -> About:
    """What would be stored of these examples, cut at ``max_length`` tokens."""
    window = min(max_length, int(np.diff(examples.offsets).max(initial=1)))
    return About(teacher, examples.digest(), count, float(temperature), vocabulary, window)


def starts(examples: Examples) -> list[int]:
    """Where each file begins, and where the last one ends: at ends of examples."""
    found = [0]
    for end in examples.offsets[1:].tolist():
        if end - found[-1] >= TOKENS:
            found.append(end)
    size = int(examples.offsets[-1])
    return found if found[-1] == size and len(found) > 1 else [*found, size]


def begin(folder: Path, of: About, edges: list[int]) -> tuple[list[int], list[int]]:
    """Begins the folder, cut at ``edges``, if there is none: where its files are cut, and the numbers of those that are
    yet to be made. Raises DataError for a folder of anything else."""
    if (folder / ABOUT).exists():
        edges = _refuse_other(folder, of)["starts"]
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        remedy = "Choose another folder, or empty it."
        raise DataError(str(folder), "", f"something else (no {ABOUT} in it)", "a new folder", remedy)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(of), "starts": edges}, indent=1)
        _replace(folder / ABOUT, text.encode())
    return edges, [number for number in range(len(edges) - 1) if not _file(folder, number).exists()]


def write(folder: Path, number: int, ids: np.ndarray, logp: np.ndarray) -> None:
    """Writes one file, at once or not at all. ids: int[tokens, K]; logp: float[tokens, K]."""
    table = np.empty(ids.shape, RECORD)
    table["id"], table["logp"] = ids, np.maximum(logp, np.finfo(np.float16).min)
    partial = _file(folder, number).with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, table)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, _file(folder, number))


@dataclass(frozen=True)
class Stored:
    """What is on disk, to be read by the place of a token in `Examples.tokens`."""

    folder: Path
    about: About
    starts: tuple[int, ...]

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of tokens `[start, stop)`: ids int32[tokens, K] and log-probabilities float16[tokens, K]."""
        first, last = (int(np.searchsorted(self.starts, at, side="right")) - 1 for at in (start, max(start, stop - 1)))
        parts = []
        for number in range(first, last + 1):
            begin, end = self.starts[number : number + 2]
            table = _table(self.folder, number, (end - begin, self.about.count))
            parts.append(table[max(start - begin, 0) : stop - begin])
        whole = np.concatenate(parts)
        return whole["id"], whole["logp"]

    def beside(self, own: Examples, plan: pack.Plan, room: int, config: DataConfig) -> Beside:
        """For these examples as they are packed, in documents of at most `room` tokens: `teacher_ids` int32 and
        `teacher_logp` float16, `[rows, T, K]`, zeros where there is no token.

        Raises DataError if they are not those of which it was made."""
        of = self.about
        now = about(own, of.teacher, of.count, of.temperature, of.vocabulary, room)
        refuse_other(str(self.folder), of, now)
        if config.packing == "wrapped":
            got, expected = "wrapped, with a stored teacher", "documents that begin where the teacher's did"
            raise DataError("", "data.packing", got, expected, "Set data.packing=best_fit or none.")

        def arrays(rows: pack.Epoch, first: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
            ids, logp = (np.zeros((*shape, of.count), kind) for kind in (np.int32, np.float16))
            for row, at, start, stop in pack.places(rows, first, shape[0], plan.reserved):
                here = slice(at, at + stop - start)
                ids[row, here], logp[row, here] = self.rows(start, stop)
            return {"teacher_ids": ids, "teacher_logp": logp}

        return arrays


def read(folder: str | Path, of: About) -> Stored:
    """Opens what was stored; an ``of.teacher`` of "" accepts any, and an ``of.vocabulary`` of 0.

    Raises DataError naming what it was made of that is not as in ``of``, and for a folder that is not whole."""
    folder = Path(folder)
    said = _refuse_other(folder, of)
    stored = Stored(folder, About(**{f.name: said[f.name] for f in dataclasses.fields(About)}), tuple(said["starts"]))
    files = len(stored.starts) - 1
    left = [number for number in range(files) if not _file(folder, number).exists()]
    if left:
        got = f"{files - len(left)} of {files} files (the first that is missing: {_file(folder, left[0]).name})"
        raise DataError(str(folder), "", got, "all of them", "Go on with storing: the same command does what is left.")
    return stored


def vocabulary(file: Path) -> int:
    """How many ids the teacher chose among, as a folder's `topk.json` says. Raises DataError if it does not."""
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["vocabulary"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"what cannot be read ({error})"
        raise DataError(str(file), "", got, "a folder of stored log-probabilities", "Store them first.") from None


def _refuse_other(folder: Path, of: About) -> dict[str, Any]:
    """What the folder says of itself. Raises DataError unless it is ``of`` that."""
    file = folder / ABOUT
    if not file.is_file():
        raise DataError(str(folder), "", f"no {ABOUT}", "a folder of stored log-probabilities", "Store them first.")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        names = {"format", "starts", *(f.name for f in dataclasses.fields(About))}
        if said["format"] != FORMAT or set(said) != names:
            raise ValueError(f"format {said['format']} with {', '.join(said)}")
    except (ValueError, KeyError, TypeError) as error:
        remedy = "It is damaged, or of another version: store them again."
        raise DataError(str(file), "", f"what cannot be read ({error})", f"format {FORMAT}", remedy) from None
    refuse_other(str(folder), About(**{f.name: said[f.name] for f in dataclasses.fields(About)}), of)
    return said


def refuse_other(where: str, own: About, of: About) -> None:
    """Raises DataError naming the first thing in which what is stored is not what is wanted."""
    for name, expected in dataclasses.asdict(of).items():
        got = dataclasses.asdict(own)[name]
        if got != expected and expected not in ("", 0):
            remedy = f"It was made of {WORDS[name]}: store them again in another folder."
            raise DataError(where, name, repr(got), repr(expected), remedy)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _table(folder: Path, number: int, shape: tuple[int, int]) -> np.ndarray:
    """A file's records, memory-mapped. Raises DataError unless they are as many as expected."""
    file, remedy = _file(folder, number), "It is damaged: delete it, and store again what is missing."
    try:
        table = _mapped(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(str(file), "", f"what cannot be read ({error})", "a numpy file", remedy) from None
    if table.shape != shape or table.dtype != RECORD:
        got, expected = f"{table.dtype} {list(table.shape)}", f"{RECORD} {list(shape)}"
        raise DataError(str(file), "", got, expected, remedy)
    return table


@functools.lru_cache(maxsize=256)
def _mapped(file: Path, changed: int) -> np.ndarray:
    """``changed``: when, so that a file that was replaced is opened anew."""
    return np.load(file, mmap_mode="r", allow_pickle=False)
