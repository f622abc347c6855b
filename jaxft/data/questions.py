"""Prompts to answer, from rows of any format: all that stands before the last reply, or a column `prompt` alone.

For objectives on what the policy itself writes, `prepare` makes them of all rows, each with its other columns, which
the reward functions are given.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.data import encode, formats, sources
from jaxft.data import examples as examples_
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.prompts import Prompt
from jaxft.data.prompts import prompts as prompts_
from jaxft.data.records import SKIP, Row

TAKEN = ("prompts", "completions", "completion_ids", "finished", "trainer_state", "log_metric", "log_extra")
"""What reward functions are given under these names is no column of the data."""


@dataclass(frozen=True)
class Questions:
    """Prompts to train on, and held-out ones (None: there are none)."""

    train: list[Prompt]
    held_out: list[Prompt] | None
    skipped: int = 0
    """Bad rows that were left out (`data.on_error: skip`)."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that any row has besides its prompt."""
        return tuple(dict.fromkeys(name for prompt in (*self.train, *(self.held_out or ())) for name in prompt.columns))

    def digest(self) -> str:
        """A hash of the training prompts, in order: what a cursor belongs to."""
        state = hashlib.blake2b(digest_size=16)
        for prompt in self.train:
            state.update(np.array([len(prompt.tokens), *prompt.tokens], np.int32).tobytes())
        return state.hexdigest()


def prepare(config: DataConfig, tokenizer: Any, room: int) -> Questions:
    """The prompts of everything the config names, with their columns. Raises DataError at the first bad row, unless
    skipping: one that cannot be read or is longer than ``room`` tokens."""
    sources.check(config)
    if config.sources:
        got = f"sources {', '.join(config.sources)}, for an objective on what the policy writes"
        raise DataError("", "data.sources", got, "data.path", "Name all files in data.path, in the parts you want.")
    examples_.check(config, "tokens")
    train, keys, skipped = _read(config, tokenizer, room)
    held_out = None
    if config.eval_path is not None or config.eval_split is not None:
        path, split = config.eval_path or config.path, config.eval_split or config.split
        held_out, _, more = _read(dataclasses.replace(config, path=path, split=split, limit=None), tokenizer, room)
        skipped += more
    elif config.eval_fraction or config.eval_examples:
        aside = examples_.hold_out(np.arange(len(train)), np.array(keys, np.uint64), config)
        held_out = [prompt for prompt, out in zip(train, aside, strict=True) if out]
        train = [prompt for prompt, out in zip(train, aside, strict=True) if not out]
    if not train:
        remedy = "Give rows with a `prompt`, or chats. See data.on_error, data.eval_fraction, data.limit."
        raise DataError(str(config.path), "", f"no prompt ({skipped} bad rows skipped)", "at least one", remedy)
    return Questions(train, held_out, skipped)


def _read(config: DataConfig, tokenizer: Any, room: int) -> tuple[list[Prompt], list[int], int]:
    """The prompts of a source, the content key of each row, and how many were bad."""
    rows, written = rows_of(config, "tokens", None)
    try:
        found = _told(rows, written, config, tokenizer, room)
        return found, [encode.key_of(row) for row in rows[: len(found)]], 0
    except DataError:
        if config.on_error == "refuse":
            raise
    found, keys, bad = [], [], 0
    for row in rows:
        try:
            found += _told([row], written, config, tokenizer, room)
            keys.append(encode.key_of(row))
        except DataError:
            bad += 1
    return found, keys, bad


def _told(rows: list[Row], written: str, config: DataConfig, tokenizer: Any, room: int) -> list[Prompt]:
    """The prompts of rows with their columns. Raises DataError for one that has none, or a longer one."""
    if written == "text":
        remedy = "Name the column of the prompts: data.columns={text: prompt}."
        raise DataError(str(config.path), "text", "plain text", "rows with a `prompt`, or chats", remedy)
    found = []
    for row, prompt in zip(rows, prompts(rows, written, config, tokenizer), strict=True):
        if len(prompt.tokens) > room:
            got = f"a prompt of {len(prompt.tokens):,} tokens"
            remedy = "Raise data.max_length, lower rollout.max_new_tokens. " + SKIP
            raise DataError(row.where, "prompt", got, f"at most {room:,}, with room for a completion", remedy)
        columns = _columns(row, written)
        answer = _answer(row.fields) if not written else prompt.answer
        columns = {"answer": answer, **columns} if answer else columns
        found.append(dataclasses.replace(prompt, answer=answer, columns=columns))
    return found


def _columns(row: Row, written: str) -> dict[str, Any]:
    """All that a row says besides its prompt. Raises DataError for a name that means something else to a reward."""
    own = ("prompt", "tools") if not written else formats.FORMATS["tokens"][written].fields
    columns = {name: value for name, value in row.fields.items() if name not in own}
    if taken := [name for name in TAKEN if name in columns]:
        got, expected = "a column of that name", "another: reward functions are given something else under it"
        raise DataError(row.where, taken[0], got, expected, f"Rename it: data.columns={{{taken[0]}: another_name}}.")
    return columns


def _answer(fields: Mapping[str, Any]) -> str:
    """What exact match compares with: the column `answer`, else the completion; empty where there is neither."""
    said = fields.get("answer", fields.get("completion"))
    if isinstance(said, list) and said and isinstance(said[-1], dict):
        said = said[-1].get("content")
    return str(said) if isinstance(said, str | int | float) and not isinstance(said, bool) else ""


def rows_of(config: DataConfig, wanted: str, limit: int | None) -> tuple[list[Row], str]:
    """The first rows of a source and their format: "" where they have a prompt, whatever else they hold.

    Raises DataError for a row that cannot be read, unless those are skipped."""
    source, rows = examples_.read(config), []
    if not any(isinstance(row, Row) and "prompt" in row.fields for row in source.rows(0, 1)):
        source, written = examples_.opened(source, config.path, config, wanted)
    else:
        written = ""
    for row in source.rows(0, len(source) if limit is None else min(limit, len(source))):
        if isinstance(row, Row):
            rows.append(row)
        elif config.on_error == "refuse":
            raise row
    return rows, written


def prompts(rows: Sequence[Row], written: str, config: DataConfig, tokenizer: Any) -> list[Prompt]:
    """The prompts of rows of a format; of none (""): of their column `prompt`."""
    if not written:
        rows, written = [_asking(row, config.task_column) for row in rows], "prompt_completion"
    return prompts_(rows, written, config, tokenizer)


def _asking(row: Row, task: str | None) -> Row:
    """The prompt of a row with a completion that stands for the answer."""
    prompt = row.fields.get("prompt")
    reply: Any = "-" if isinstance(prompt, str) else [{"role": "assistant", "content": "-"}]
    kept = {name: value for name, value in row.fields.items() if name in ("prompt", "tools", task)}
    return Row({**kept, "completion": reply}, row.where)
