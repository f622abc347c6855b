"""What people say of answers: how an order is typed, and the two files that it goes to.

`NAME.jsonl` holds preferences, `{"prompt", "chosen", "rejected"}`, one for every two answers of which one was put
before the other; `NAME.ranked.jsonl` holds what was decided of each prompt, ties and skipped prompts too. The second is
written first, a line at a time and to the disk, so that what is missing in the first after a crash can be made up for.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.border.errors import ConfigError

RANKED = ".ranked.jsonl"
Order = list[list[int]]
"""Numbers of answers, from 0: the best ones first; those in one list are equally good."""


def order(text: str, count: int) -> Order:
    """What `2 1 3`, `2 > 1 > 3` or `2=1 3` says of so many answers. Raises ValueError."""
    words = re.sub(r"\s*=\s*", "=", text.replace(",", " ").replace(">", " ")).split()
    found = [[int(part) if part.isdecimal() else 0 for part in word.split("=")] for word in words]
    said = [number for group in found for number in group]
    if sorted(said) != list(range(1, count + 1)):
        example = " ".join(map(str, range(count, 0, -1)))
        raise ValueError(f"got {text!r}; expected each of 1 to {count} once, the best first ({example}; ties: 1=2)")
    return [[number - 1 for number in group] for group in found]


def pairs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The preferences that follow from a decision: the better answer of every two that are not equally good."""
    groups = [[record["answers"][i] for i in group] for group in record.get("order") or []]
    prompt, chat = record["prompt"], isinstance(record["prompt"], list)

    def reply(answer: dict[str, Any]) -> Any:
        return [{"role": "assistant", "content": answer["text"]}] if chat else answer["text"]

    more = {"tools": record["tools"]} if record.get("tools") else {}
    return [
        {"prompt": prompt, "chosen": reply(better), "rejected": reply(worse), **more}
        for first, second in itertools.combinations(groups, 2)
        for better in first
        for worse in second
    ]


def identity(prompt: Any) -> str:
    """What tells a prompt from others."""
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


class Book:
    """The two files, open for one process. Lines are added at their ends alone, and taken back by `undo` alone."""

    def __init__(self, out: Path):
        """Raises ConfigError for a file that is in use or was not made here."""
        self.out, self.ranked = out, out.with_name(out.name.removesuffix(".jsonl") + RANKED)
        if out.suffix != ".jsonl":
            raise ConfigError(f"--out: got {out}; expected a file that ends in .jsonl")
        if out.exists() and not self.ranked.exists() and out.stat().st_size:
            raise ConfigError(f"--out: {out} is there, and {self.ranked.name} is not: it was not made by jaxft rank")
        out.parent.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = {}
        """Decisions by the prompt's identity."""
        self._before: list[tuple[str, int, int]] = []
        with contextlib.ExitStack() as stack:
            self._files = [stack.enter_context(open(path, "a+b")) for path in (self.ranked, out)]
            try:
                fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"--out: another process is writing {self.ranked}; let it end") from None
            self._recover()
            self._stack = stack.pop_all()

    def __enter__(self) -> "Book":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def preferences(self) -> int:
        """How many were written, in all."""
        return sum(len(pairs(record)) for record in self.done.values())

    def add(self, record: dict[str, Any]) -> None:
        """Writes a decision and what follows from it."""
        ranked, out = map(_size, self._files)
        _append(self._files[0], [record])
        _append(self._files[1], pairs(record))
        self.done[identity(record["prompt"])] = record
        self._before.append((identity(record["prompt"]), ranked, out))

    def undo(self) -> dict[str, Any] | None:
        """Takes back the last decision since the file was opened; None if there is none."""
        if not self._before:
            return None
        name, ranked, out = self._before.pop()
        _cut(self._files[1], out)
        _cut(self._files[0], ranked)
        return self.done.pop(name)

    def _recover(self) -> None:
        """Reads what is there; a line that was cut short goes, and preferences of the last decision that are not there
        yet are written."""
        for file in self._files:
            file.seek(0)
            _cut(file, file.read().rfind(b"\n") + 1)
        self._files[0].seek(0)
        for number, line in enumerate(self._files[0].read().splitlines(), 1):
            try:
                record = json.loads(line)
                self.done[identity(record["prompt"])] = record
                pairs(record)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                remedy = "mend or delete the line"
                raise ConfigError(f"{self.ranked}:{number}: no decision of jaxft rank ({error}); {remedy}") from None
        if self.done:
            self._files[1].seek(0)
            there = self._files[1].read().splitlines()
            wanted = [_line(row).rstrip(b"\n") for record in self.done.values() for row in pairs(record)]
            last = len(pairs([*self.done.values()][-1]))
            if there == wanted[: len(there)] and len(wanted) - len(there) <= last:  # else somebody has edited it
                _append(self._files[1], [json.loads(line) for line in wanted[len(there) :]])


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _append(file: Any, rows: Sequence[dict[str, Any]]) -> None:
    """At once, and to the disk."""
    if rows:
        file.write(b"".join(map(_line, rows)))
        file.flush()
        os.fsync(file.fileno())


def _size(file: Any) -> int:
    return os.fstat(file.fileno()).st_size


def _cut(file: Any, size: int) -> None:
    if _size(file) != size:
        os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())
