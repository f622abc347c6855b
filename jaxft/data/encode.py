"""Rows to tokens and the mask of what is learnt, a chunk of rows at a time; runs in worker processes."""

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxft.data import groups, texts, trees
from jaxft.data.errors import DataError
from jaxft.data.groups import Group
from jaxft.data.records import Row
from jaxft.data.texts import Encoder, Tokens


@dataclass(frozen=True)
class Chunk:
    """The examples of some rows, flat: `tokens`, `loss`, and for each example its length, row, and the row's key and
    task."""

    tokens: np.ndarray
    loss: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    tasks: np.ndarray
    columns: dict[str, np.ndarray]
    """What else is known of each example (see `Examples`)."""
    steps: np.ndarray
    """See `Tokens`."""
    errors: tuple[DataError, ...]
    silent: int
    """Rows in which no message is to be learnt, or nothing can be compared."""
    cut: int
    """Learnt parts that are tokenised apart from their prompts, as at inference."""
    shared: int
    """Learnt parts that should be, and cannot."""


class Made(NamedTuple):
    """A group with what is known of its row."""

    group: Group
    where: str
    number: int
    key: int
    task: int


def encode(encoder: Encoder, rows: list[Row | DataError], first: int) -> Chunk:
    """Tokenise rows, the first of which has the number `first`."""
    found: list[Made] = []
    errors: dict[int, DataError] = {}
    silent = 0
    for number, row in enumerate(rows, first):
        try:
            if isinstance(row, DataError):
                raise row
            made, task = groups.groups_of(encoder, row), task_of(row, encoder.task_column, encoder.task)
        except DataError as error:
            errors[number] = error
            continue
        silent += not made
        found += [Made(group, row.where, number, key_of(row), task) for group in made]
    tokens = iter(texts.tokenise(encoder, [text for made in found for text in made.group.texts]))
    kept: list[tuple[Made, Tokens]] = []
    for made in found:
        several = [next(tokens) for _ in made.group.texts]
        try:
            kept += [(made, each) for each in groups.checked(encoder, several, made.where)]
        except DataError as error:
            errors.setdefault(made.number, error)
    kept = [(made, each) for made, each in kept if made.number not in errors]
    examples = [each for _, each in kept]
    return Chunk(
        np.concatenate([each.ids for each in examples] or [np.zeros(0, np.int32)]),
        np.concatenate([each.loss for each in examples] or [np.zeros(0, bool)]),
        np.array([len(each.ids) for each in examples], np.int64),
        np.array([made.number for made, _ in kept], np.int64),
        np.array([made.key for made, _ in kept], np.uint64),
        np.array([made.task for made, _ in kept], np.int32),
        groups.columns(encoder, [made.group for made, _ in kept]),
        np.concatenate([each.steps for each in examples] or [np.zeros(0, np.int8)]),
        tuple(errors[number] for number in sorted(errors)),
        silent,
        sum(each.cut for each in examples),
        sum(each.shared for each in examples),
    )


def task_of(row: Row, column: str | None, default: int = 0) -> int:
    """The number of the row's task; the default where the data have no column for it."""
    task = default if column is None else row.fields.get(column)
    if isinstance(task, bool) or not isinstance(task, int) or task < 0:
        remedy = "Number the tasks, or leave data.task_column out."
        raise DataError(row.where, str(column), repr(task), "a whole number from 0 on", remedy)
    return task


def key_of(row: Row) -> int:
    """64 bits of the row's content (as it was before a prompt template told it), or of the tree that it is of: what
    decides whether it is held out."""
    if row.content is not None:
        return row.content
    fields = {trees.TREE: row.fields[trees.TREE]} if row.fields.get(trees.TREE) else row.fields
    content = json.dumps(fields, sort_keys=True, default=str, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
