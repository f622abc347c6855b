"""Rows from files: jsonl, json and csv with the standard library alone, everything else through `datasets`
(`arrow.py`).

Each row knows its file and line. A jsonl file is not held in memory: only the offsets of its lines are, so that a
worker process receives a small object and reads what it needs. A row that cannot be read is a `DataError` in its place.
"""

import csv
import glob
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxft.data import arrow
from jaxft.data.errors import DataError, short

BLOCK = 2**20
"""Bytes of a file that are looked at together."""
SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}


@dataclass(frozen=True)
class Row:
    """One row as read: its columns, and `file:line`."""

    fields: dict[str, Any]
    where: str
    content: int | None = None
    """64 bits of what it was made of, where that are other columns; rows of the same are held out together."""


class Source(Protocol):
    """Rows with random access; a row that cannot be read is the error that says why."""

    def __len__(self) -> int: ...
    def rows(self, start: int, stop: int) -> list[Row | DataError]: ...


@dataclass(frozen=True)
class JsonLines:
    """A jsonl file, by the byte offsets of its non-blank lines."""

    path: str
    starts: np.ndarray
    stops: np.ndarray
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, start: int, stop: int) -> list[Row | DataError]:
        """Parse lines `start` to `stop` (counted without blank ones)."""
        if start >= stop:
            return []
        first = int(self.starts[start])
        with open(self.path, "rb") as file:
            file.seek(first)
            data = file.read(int(self.stops[stop - 1]) - first)
        spans = zip(self.starts[start:stop], self.stops[start:stop], self.lines[start:stop], strict=True)
        return [parse_line(data[a - first : b - first], f"{self.path}:{line}") for a, b, line in spans]


@dataclass(frozen=True)
class Memory:
    """Rows held in memory (json, csv)."""

    items: tuple[Row | DataError, ...]

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, start: int, stop: int) -> list[Row | DataError]:
        """The rows from `start` to `stop`."""
        return list(self.items[start:stop])


@dataclass(frozen=True)
class Text:
    """A text file, which is one document."""

    path: str

    def __len__(self) -> int:
        return 1

    def rows(self, start: int, stop: int) -> list[Row | DataError]:
        """The document, if it is asked for."""
        if start > 0 or stop < 1:
            return []
        try:
            return [Row({"text": Path(self.path).read_text(encoding="utf-8-sig")}, self.path)]
        except UnicodeDecodeError as error:
            got = f"bytes that are not UTF-8 ({error.reason})"
            return [DataError(self.path, "", got, "UTF-8 text", "Re-save the file as UTF-8.")]


@dataclass(frozen=True)
class Arrow:
    """A `datasets.Dataset`; the place of a row is its number."""

    table: Any
    label: str

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, start: int, stop: int) -> list[Row | DataError]:
        """The rows from `start` to `stop`, without the nulls that Arrow adds to make all rows alike."""
        return [
            Row(fields, f"{self.label}:row {start + i + 1}")
            for i, fields in enumerate(arrow.read(self.table, start, stop))
        ]


@dataclass(frozen=True)
class Records:
    """Sources one after the other, cut to `size` rows, columns renamed."""

    parts: tuple[Source, ...]
    size: int
    columns: dict[str, str]

    def __len__(self) -> int:
        return self.size

    def rows(self, start: int, stop: int) -> list[Row | DataError]:
        """The rows from `start` to `stop`, across sources."""
        found: list[Row | DataError] = []
        begin = 0
        for part in self.parts:
            low, high = max(start, begin), min(stop, self.size, begin + len(part))
            if low < high:
                found += part.rows(low - begin, high - begin)
            begin += len(part)
        return [rename(row, self.columns) for row in found]


def read(
    path: str | Sequence[str], split: str, subset: str | None, limit: int | None, columns: dict[str, str]
) -> Records:
    """Open every source named by `path`; rows are read when asked for."""
    paths = [path] if isinstance(path, str) else list(path)
    if not paths or not all(paths):
        expected = "a file, a directory or a hub name"
        raise DataError("", "data.path", short(path), expected, "Set data.path=<your.jsonl>.")
    parts = tuple(part for one in paths for part in open_path(one, split, subset))
    size = sum(len(part) for part in parts)
    if size == 0:
        raise DataError(", ".join(paths), "", "no rows", "at least one row", "Check data.path and data.split.")
    return Records(parts, size if limit is None else min(size, limit), columns)


def open_path(path: str, split: str, subset: str | None) -> list[Source]:
    """The sources behind one entry of `data.path`."""
    place = Path(path).expanduser()
    if place.is_file():
        return [open_file(str(place))]
    if place.is_dir():
        if arrow.is_saved(place):
            return [Arrow(arrow.load_saved(place, split), path)]
        return [open_file(str(file)) for file in directory_files(place, split)]
    matches = sorted(glob.glob(str(place), recursive=True))
    if matches:
        return [open_file(match) for match in matches]
    if place.suffix in OPENERS or not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w-]+", path):
        raise DataError(path, "data.path", "nothing there", "a file, a directory or a hub name", "Check the spelling.")
    return [Arrow(arrow.load_hub(path, subset, split), path)]


def directory_files(place: Path, split: str) -> list[Path]:
    """Data files of a directory; when names carry splits (`train-0001.parquet`), only those of `split`."""
    files = sorted(file for file in place.iterdir() if file.suffix in OPENERS)
    files = [file for file in files if file.suffix != ".txt"] or files  # a text beside data files is about them
    words = {file: set(re.split(r"[^a-z]+", file.stem.lower())) for file in files}
    named = [file for file in files if split in words[file]]
    if not named and any(words[file] & SPLITS for file in files):
        names = ", ".join(file.name for file in files)
        raise DataError(str(place), "data.split", repr(split), f"a split among the files {names}", "Set data.split.")
    if not files:
        raise DataError(
            str(place), "data.path", "a directory without data files", f"files ending in {', '.join(OPENERS)}", ""
        )
    return named or files


def open_file(path: str) -> Source:
    """A data file, by its suffix."""
    suffix = Path(path).suffix
    if suffix not in OPENERS:
        raise DataError(
            path, "data.path", f"suffix {suffix!r}", f"one of {', '.join(OPENERS)}", "Convert or unpack the file first."
        )
    try:
        return OPENERS[suffix](path)
    except UnicodeDecodeError as error:
        got = f"bytes that are not UTF-8 ({error.reason})"
        raise DataError(path, "", got, "UTF-8 text", "Re-save the file as UTF-8.") from error


def fingerprint(source: Source) -> Any:
    """What tells these rows from others without reading them, JSON: files by place, size and time. Raises DataError
    for rows that are made of others."""
    if isinstance(source, Records):
        return [[fingerprint(part) for part in source.parts], source.size, source.columns]
    if isinstance(source, JsonLines | Text):
        about = Path(source.path).stat()
        return [str(Path(source.path).resolve()), about.st_size, about.st_mtime_ns]
    if isinstance(source, Arrow):
        return [source.label, source.table._fingerprint]
    if isinstance(source, Memory):
        return hashlib.blake2b(repr(source.items).encode("utf-8", "surrogatepass")).hexdigest()
    if (identity := getattr(source, "identity", None)) is not None:
        return identity()
    got = f"rows made by {type(source).__name__}"
    raise DataError("", "data.cache", got, "rows as they stand in files or data sets", "Leave data.cache out.")


def open_jsonl(path: str) -> JsonLines:
    """Index the lines of a jsonl file, of which a block at a time is in memory."""
    stops, solid, at, words = [], [], 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            data = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(data == ord("\n"))
            counts = np.concatenate(([0], np.cumsum(data > ord(" "))))
            stops.append(at + ends)
            solid.append(words + counts[ends])  # bytes that are not blank before each line's end
            at, words = at + len(data), words + int(counts[-1])
    stops, solid = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (stops, solid))
    if at and (len(stops) == 0 or stops[-1] != at - 1):
        stops, solid = np.append(stops, at), np.append(solid, words)
    starts = np.concatenate(([0], stops[:-1] + 1)).astype(np.int64)[: len(stops)]
    keep = solid > np.concatenate(([0], solid[:-1]))[: len(solid)]
    return JsonLines(path, starts[keep], stops[keep], (np.arange(len(stops)) + 1)[keep])


def parse_line(line: bytes, where: str) -> Row | DataError:
    """One line of jsonl."""
    try:
        text = line.decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        got = f"bytes that are not UTF-8 ({error.reason})"
        return DataError(where, "", got, "UTF-8 text", "Re-save the file as UTF-8.")
    except json.JSONDecodeError as error:
        got = f"malformed JSON ({error.msg} at column {error.colno})"
        return DataError(where, "", got, "one JSON object a line", SKIP)
    return as_row(value, where, text)


def as_row(value: Any, where: str, text: str) -> Row | DataError:
    """A value parsed from `text` as a row, if it is an object of characters that exist."""
    if re.search(r"\\u[dD]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            got = f"half a character ({error.object[error.start]!a}, a lone surrogate)"
            return DataError(where, "", got, "text that can be written as UTF-8", SKIP)
    if isinstance(value, dict):
        return Row(value, where)
    return DataError(where, "", f"JSON of type {type(value).__name__}", "a JSON object with named fields", SKIP)


def open_json(path: str) -> Source:
    """A JSON array of objects, or (as many files named .json are) jsonl."""
    text = Path(path).read_text(encoding="utf-8-sig")
    position = skip_blank(text, 0)
    if text[position : position + 1] == "{":
        return open_jsonl(path)
    if text[position : position + 1] != "[":
        expected = "a JSON array of objects, or one object a line"
        raise DataError(path, "", short(text[:20]), expected, "Convert the file.")
    return Memory(tuple(parse_array(text, position + 1, path)))


def parse_array(text: str, position: int, path: str) -> list[Row | DataError]:
    """The elements of a JSON array, each with the line it starts on; malformed JSON in an array always refuses."""
    decoder = json.JSONDecoder()
    found: list[Row | DataError] = []
    line, counted = 1, 0
    while True:
        position = skip_blank(text, position)
        if text[position : position + 1] == "]":
            return found
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        start = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            got = f"malformed JSON ({error.msg})"
            remedy = "Mend it, or convert the file to jsonl, where single rows can be skipped."
            raise DataError(f"{path}:{error.lineno}", "", got, "a JSON array of objects", remedy) from None
        found.append(as_row(value, where, text[start:position]))
        position = skip_blank(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            raise DataError(where, "", short(text[position : position + 20]), "`,` or `]` after an element", "Mend it.")


def skip_blank(text: str, position: int) -> int:
    """The first position from `position` on that is not white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def open_csv(path: str) -> Memory:
    """A csv file with a header; a record's line is the one it starts on."""
    csv.field_size_limit(sys.maxsize)
    items: list[Row | DataError] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        line = reader.line_num + 1
        for record in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if len(record) == len(header):
                items.append(Row(dict(zip(header, record, strict=True)), where))
            elif record:
                got, expected = f"{len(record)} cells", f"{len(header)} (the header's)"
                remedy = "Quote cells that hold commas or line breaks. " + SKIP
                items.append(DataError(where, "", got, expected, remedy))
    return Memory(tuple(items))


def open_parquet(path: str) -> Arrow:
    """A parquet file."""
    return Arrow(arrow.load_parquet(path), path)


def rename(row: Row | DataError, columns: dict[str, str]) -> Row | DataError:
    """The row with columns renamed; a column that is not there is an error."""
    if isinstance(row, DataError) or not columns:
        return row
    for old in columns:
        if old not in row.fields:
            got = f"columns {sorted(row.fields)}"
            return DataError(row.where, old, got, f"the column {old!r}", "See data.columns.")
    kept = {name: value for name, value in row.fields.items() if name in columns or name not in columns.values()}
    return Row({columns.get(name, name): value for name, value in kept.items()}, row.where)


SKIP = "Mend the row, or set data.on_error=skip."
OPENERS = {".jsonl": open_jsonl, ".json": open_json, ".csv": open_csv, ".parquet": open_parquet, ".txt": Text}
