"""The one exception of the data room: what is wrong, in which file and line, and what to do about it."""

import contextlib
from collections.abc import Iterator
from typing import Any


class DataError(ValueError):
    """A row, a file or a template that cannot be used; `where` is `file:line` when a row is to blame."""

    def __init__(self, where: str, field: str, got: str, expected: str, remedy: str):
        super().__init__(where, field, got, expected, remedy)
        self.where, self.field, self.got, self.expected, self.remedy = where, field, got, expected, remedy

    def __str__(self) -> str:
        at = f"{self.where}: " if self.where else ""
        field = f"`{self.field}`: " if self.field else ""
        return f"{at}{field}got {self.got}; expected {self.expected}. {self.remedy}".rstrip()


@contextlib.contextmanager
def called(key: str, name: str) -> Iterator[None]:
    """What is wrong with the setting `key` is said of `name`, the setting that stands for it here."""
    try:
        yield
    except DataError as error:
        if error.field != key:
            raise
        raise DataError(error.where, name, error.got, error.expected, error.remedy) from error


def short(value: Any, limit: int = 80) -> str:
    """`repr(value)` cut to `limit` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
