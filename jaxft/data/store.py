"""Tokenised examples on disk: written once, chunk by chunk, then read through memory maps.

So a corpus larger than memory keeps what the loader is built on: batch `i` is a pure function of (examples, settings,
i), any order and any packing are possible, and resuming is exact and free. A stream through a shuffle buffer would give
these up to save one pass over the text, which tokenising needs anyway.

A folder holds one file an array, to which chunks are appended in the order of the rows, and `progress.json`, replaced
as a whole when they are safely there. What was cut short is cut back to what it says and goes on; so the files are the
same however often that happened, and whatever the number of workers.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data import records, texts
from jaxft.data.encode import Chunk
from jaxft.data.errors import DataError

VERSION = 1
PROGRESS = "progress.json"
FLUSH = 2**26
"""Bytes written between two times that progress is."""
TOGETHER = 2**20
"""Tokens copied at once."""
ARRAYS: dict[str, Any] = {
    "tokens": np.int32, "loss": np.bool_,
    "lengths": np.int64, "rows": np.int64, "keys": np.uint64, "tasks": np.int32,
}  # fmt: skip
"""The first two as long as all tokens, the others as the number of examples."""
LONG = ("tokens", "loss")


@dataclasses.dataclass
class Progress:
    """How far the rows are written, and what was met among them (see `Reading`)."""

    next_row: int = 0
    sizes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(ARRAYS, 0))
    """Bytes of each file."""
    skipped: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    silent_rows: int = 0
    extra_examples: int = 0
    cut_boundaries: int = 0
    shared_boundaries: int = 0

    def take(self, chunk: Chunk, next_row: int) -> None:
        """Count a chunk in."""
        self.next_row = next_row
        for name in ARRAYS:
            self.sizes[name] += getattr(chunk, name).nbytes
        self.skipped += len(chunk.errors)
        self.errors = [*self.errors, *map(str, chunk.errors)][:5]
        self.silent_rows += chunk.silent
        self.extra_examples += len(chunk.rows) - len(np.unique(chunk.rows))
        self.cut_boundaries += chunk.cut
        self.shared_boundaries += chunk.shared


def place(folder: str, source: records.Source, encoder: texts.Encoder, on_error: str) -> Path:
    """The folder of these rows, tokenised in this way: a name made of all that decides what is in it. Raises DataError
    for rows that are not of files or of `datasets`, or that an objective judges."""
    if encoder.rows != "tokens":
        got, remedy = f"an objective on {encoder.rows}", "Leave data.cache out."
        raise DataError("", "data.cache", got, "one on running text or chats (sft, distil)", remedy)
    tokenizer = encoder.tokenizer
    facts = {
        "version": VERSION,
        "source": records.fingerprint(source),
        "tokenizer": [tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map)],
        "template": repr(encoder.render),
        "encoder": [getattr(encoder, name) for name in ("format", "loss_on", "task_column", "prefix", "suffix")],
        "task": encoder.task,
        "on_error": on_error,
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=10).hexdigest()
    return Path(folder).expanduser() / digest


def fill(folder: Path, size: int, chunks: Callable[[int], Iterator[Chunk]], step: int) -> Progress:
    """Writes the rows of `size` that are not there yet; `chunks(first)` gives those from a row on, `step` rows each.

    One process at a time: another one waits, and finds the work done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, contextlib.ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        progress = _progress(folder)
        if progress.next_row >= size:
            return progress
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "ab")) for name in ARRAYS}
        for name, file in files.items():
            file.truncate(progress.sizes[name])
        unsaved = 0
        for chunk in chunks(progress.next_row):
            for name, dtype in ARRAYS.items():
                unsaved += files[name].write(np.ascontiguousarray(getattr(chunk, name), dtype).tobytes())
            progress.take(chunk, min(progress.next_row + step, size))
            if unsaved >= FLUSH or progress.next_row >= size:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                _save(folder, progress)
                unsaved = 0
        return progress


def _progress(folder: Path) -> Progress:
    """What is there. Raises DataError if it is less than was said to be."""
    file = folder / PROGRESS
    if not file.exists():
        return Progress()
    found = Progress(**json.loads(file.read_text(encoding="utf-8")))
    for name, size in found.sizes.items():
        data = folder / f"{name}.bin"
        there = data.stat().st_size if data.exists() else 0
        if there < size:
            raise DataError(str(data), "data.cache", f"{there} bytes", f"{size}", f"Delete the folder {folder}.")
    return found


def _save(folder: Path, progress: Progress) -> None:
    new = folder / f"{PROGRESS}.new"
    new.write_text(json.dumps(dataclasses.asdict(progress)), encoding="utf-8")
    os.replace(new, folder / PROGRESS)


def read(folder: Path, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """The arrays of a folder: the long ones mapped, not read."""
    found = {}
    for name, dtype in ARRAYS.items():
        file, count = folder / f"{name}.bin", sizes[name] // np.dtype(dtype).itemsize
        if name in LONG and count:
            found[name] = np.memmap(file, dtype, "r", shape=(count,))
        else:
            found[name] = np.fromfile(file, dtype, count)
    return found


def copied(arrays: dict[str, Any], lengths: np.ndarray, keep: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens and masks of the examples that `keep` says, in files of their own beside those they are in, mapped."""
    digest = hashlib.blake2b(np.packbits(keep).tobytes(), digest_size=6).hexdigest()
    ends = np.cumsum(lengths)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], keep, [False])).astype(np.int8))).reshape(-1, 2)
    spans = [(int(ends[low] - lengths[low]), int(ends[high - 1])) for low, high in edges.tolist()]
    return {
        name: _written(Path(array.filename).with_name(f"{name}-{digest}.bin"), [array[a:b] for a, b in spans])
        for name, array in arrays.items()
    }


def joined(name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays end to end: in memory, or in a file if one of them is."""
    files = [Path(str(array.filename)) for array in arrays if isinstance(array, np.memmap)]
    if not files or len(arrays) == 1:
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    state = hashlib.blake2b(digest_size=10)
    for array in arrays:
        state.update(str(array.filename).encode() if isinstance(array, np.memmap) else array.tobytes())
        state.update(str(array.shape).encode())
    folder = files[0].parent.parent / f"joined-{state.hexdigest()}"
    folder.mkdir(exist_ok=True)
    return _written(folder / f"{name}.bin", arrays)


def _written(file: Path, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays end to end in a file, mapped; written once, a part at a time."""
    with open(file.with_name("lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            with open(file.with_suffix(".new"), "wb") as out:
                for array in arrays:
                    for at in range(0, len(array), TOGETHER):
                        out.write(array[at : at + TOGETHER].tobytes())
                out.flush()
                os.fsync(out.fileno())
            os.replace(out.name, file)
    count = sum(map(len, arrays))
    return np.memmap(file, arrays[0].dtype, "r", shape=(count,)) if count else np.concatenate(arrays)
