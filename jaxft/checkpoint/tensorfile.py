"""safetensors files, read and written a piece of one tensor at a time.

A file is 8 bytes of header length, a JSON header and the tensors' bytes. Unusual: read with plain positioned reads into
buffers we own, not through a memory map, so that no page of the file counts as this process's memory and a tensor (or
a device's slice of it) lands where it is wanted without an intermediate copy.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint.errors import CheckpointError

FLOATS: dict[str, Any] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype(np.float64),
}
PACKED: dict[str, Any] = {"U8": np.dtype(np.uint8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
DTYPES = FLOATS | PACKED  # what packed weights are made of, too
MAX_HEADER = 100_000_000  # the format's own limit
CHUNK = 4 * 2**20  # bytes read at a time
THREADS = min(4, os.cpu_count() or 1)
TILE = 16  # rows transposed at a time: what stays in the first-level cache


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: ``offset`` bytes from the start of ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    packed: bool = False
    """Whether it stands for a matrix [out, in] of this shape that is stored in few bits, in several tensors."""

    @property
    def where(self) -> str:
        return f"{self.file}: tensor '{self.name}'"


def header(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, with its length checked against them. Raises CheckpointError."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if start[:7] == b"version":
            remedy = "Fetch the file itself, for example with `git lfs pull`."
            raise CheckpointError(file, "a git-lfs pointer", "a safetensors file", remedy)
        if not 0 < length <= MAX_HEADER:
            raise _broken(file, f"{size} bytes that do not start with a safetensors header")
        if size < 8 + length:
            raise _broken(file, f"{size} bytes", f"at least {8 + length} (the header alone)")
        try:
            entries = json.loads(f.read(length))
            entries.pop("__metadata__", None)
            tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise _broken(file, f"a header that does not parse ({error})") from None
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if size != end:
        raise _broken(file, f"{size} bytes" + (", truncated" if size < end else ""), f"{end} bytes")
    return tensors


def _tensor(file: Path, name: str, entry: dict[str, Any], start: int) -> Tensor:
    first, last = entry["data_offsets"]
    tensor = Tensor(name, file, entry["dtype"], tuple(entry["shape"]), start + first, last - first)
    dtype = DTYPES.get(tensor.dtype)
    if dtype is not None and tensor.nbytes != math.prod(tensor.shape) * dtype.itemsize:
        raise _broken(file, f"{tensor.nbytes} bytes for '{name}' {tensor.dtype}{list(tensor.shape)}")
    return tensor


def _broken(file: Path, got: str, expected: str = "a whole safetensors file") -> CheckpointError:
    return CheckpointError(file, got, expected, "The file is damaged or its download stopped early: fetch it again.")


class Target(NamedTuple):
    """A piece of a tensor to be read: its rows and columns, and the array [rows, columns] to write."""

    rows: slice
    columns: slice
    array: np.ndarray


class Reader:
    """Open files and a few reading threads; use as a context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, tensor: Tensor, targets: list[Target], narrow: bool = False) -> None:
        """Fills every target, cast to its dtype; each byte of the file is read once. A vector is one row.

        ``narrow`` says that the targets will be cast to float16 later. Raises CheckpointError if the file has become
        shorter, or if a value overflows float16."""
        if tensor.file not in self._files:
            self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        columns = (1, *tensor.shape)[-1]
        step = max(1, CHUNK // max(1, columns * DTYPES[tensor.dtype].itemsize))
        first = min(t.rows.start for t in targets)
        last = max(t.rows.stop for t in targets)
        narrow |= any(t.array.dtype == np.float16 for t in targets) and tensor.dtype != "F16"

        def chunk(row: int) -> None:
            self._chunk(tensor, targets, row, min(row + step, last), narrow)

        list(self._pool.map(chunk, range(first, last, step)))

    def whole(self, tensor: Tensor) -> np.ndarray:
        """A tensor in its own shape and dtype."""
        rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
        return self.rows(tensor, 0, rows).reshape(tensor.shape)

    def rows(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        """Rows ``first:last`` of a tensor seen as a matrix, in its own dtype."""
        out = np.empty((last - first, (1, *tensor.shape)[-1]), DTYPES[tensor.dtype])
        self.read(tensor, [Target(slice(first, last), slice(0, out.shape[1]), out)])
        return out

    def _chunk(self, tensor: Tensor, targets: list[Target], first: int, last: int, narrow: bool) -> None:
        dtype = DTYPES[tensor.dtype]
        columns = (1, *tensor.shape)[-1]
        if not narrow and len(targets) == 1 and _direct(targets[0], dtype, columns):
            at = targets[0].rows.start
            self._fill(tensor, first, targets[0].array[first - at : last - at])
            return
        chunk = np.empty((last - first, columns), dtype)
        self._fill(tensor, first, chunk)
        if narrow:
            fits_float16(tensor.where, chunk)
        for target in targets:
            lo, hi = max(first, target.rows.start), min(last, target.rows.stop)
            if lo < hi:
                piece = chunk[lo - first : hi - first, target.columns]
                copy(piece, target.array[lo - target.rows.start : hi - target.rows.start])

    def _fill(self, tensor: Tensor, row: int, out: np.ndarray) -> None:
        """Reads consecutive whole rows into a contiguous array."""
        at = tensor.offset + row * out.shape[1] * out.dtype.itemsize
        view = out.reshape(-1).view(np.uint8).data
        while view:
            count = os.preadv(self._files[tensor.file], [view], at)
            if count == 0:
                raise CheckpointError(tensor.where, f"end of file at byte {at}", "more bytes", "Fetch the file again.")
            view, at = view[count:], at + count


def _direct(target: Target, dtype: Any, columns: int) -> bool:
    """Whether bytes can be read straight into the target."""
    whole = target.columns == slice(0, columns)
    return whole and target.array.dtype == dtype and target.array.flags.c_contiguous


def fits_float16(where: str, source: np.ndarray) -> None:
    """Refuses finite values that float16 would turn into infinities."""
    largest = float(np.max(np.abs(source.astype(np.float32)), initial=0.0))
    if 65504 < largest < math.inf:
        remedy = "Use bfloat16 or float32."
        raise CheckpointError(where, f"a value of {largest:g}", "at most 65504 for float16", remedy)


def copy(source: np.ndarray, out: np.ndarray) -> None:
    """``out[...] = source`` with a cast; in thin strips because ``out`` may be a transposed view."""
    if source.dtype == out.dtype and source.dtype.itemsize == 2:  # a plain copy of bits: faster than as bfloat16
        source, out = source.view(np.uint16), out.view(np.uint16)
    for r in range(0, len(source), TILE):
        out[r : r + TILE] = source[r : r + TILE].astype(out.dtype, copy=False)


def write(file: Path, tensors: list[tuple[str, Any, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Writes (name, dtype, shape) entries with their arrays, taken one at a time, and syncs the file to disk."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": codes[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for (name, dtype, shape), array in zip(tensors, arrays, strict=True):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name}: got {array.dtype}{list(array.shape)}; expected {dtype}{list(shape)}")
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
