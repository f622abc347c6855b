"""What a row is once it is converted, whatever its format, and the checks that every format shares.

Messages keep fields that only a template understands (`reasoning_content`, `name`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.data import turns
from jaxft.data.errors import DataError, short
from jaxft.data.records import SKIP, Row


@dataclass(frozen=True)
class Document:
    """Plain text, learnt whole."""

    text: str


@dataclass(frozen=True)
class Pair:
    """Strings: what is given and what is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Chat messages as a template takes them; `train` holds each message's own flag; the first `given` are context."""

    messages: tuple[dict[str, Any], ...]
    train: tuple[bool | None, ...]
    tools: tuple[dict[str, Any], ...] = ()
    given: int = 0


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, of which the first is preferred (by `margin`, where the data say so)."""

    chosen: Pair | Conversation
    rejected: Pair | Conversation
    margin: float | None = None


@dataclass(frozen=True)
class Labelled:
    """A completion that is desirable (True) or not."""

    form: Pair | Conversation
    label: bool


@dataclass(frozen=True)
class Stepwise:
    """A solution in steps, each right (True) or wrong; `prompt` is text or messages."""

    prompt: str | Conversation
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


Form = Document | Pair | Conversation | Preference | Labelled | Stepwise


def taught(form: Form | None) -> Document | Pair | Conversation | None:
    """What sft would learn of a form: the completion that is preferred, or labelled; nothing of a solution in steps."""
    if isinstance(form, Preference):
        return form.chosen
    return form.form if isinstance(form, Labelled) else None if isinstance(form, Stepwise) else form


def conversation(
    row: Row, field: str, messages: Sequence[Any], given: int = 0, places: Sequence[str] | None = None
) -> Conversation:
    """Check and normalise messages: known roles in order, text contents, flags taken out, tool calls as objects.

    ``places``: what errors call each message; `field[0]`, `field[1]`, ... if left out."""
    clean, flags = [], []
    places = [f"{field}[{i}]" for i in range(len(messages))] if places is None else places
    for place, message in zip(places, messages, strict=True):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(row.where, place, short(message), "an object with `role` and `content`", SKIP)
        message, flag = turns.take_flag(row.where, place, message)
        clean.append(turns.normalise(row.where, place, message))
        flags.append(flag)
    turns.check_order(row.where, field, clean, places)
    return Conversation(tuple(clean), tuple(flags), tools_of(row), given)


def from_pair(row: Row) -> Pair | Conversation:
    """`{"prompt": …, "completion": …}`: both strings, or both messages (the prompt is then context alone)."""
    prompt, completion = parsed(row, "prompt"), parsed(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise DataError(row.where, "completion", "an empty completion", "something to learn", SKIP)
        return Pair(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation(row, "prompt + completion", [*prompt, *completion], given=len(prompt))
    got = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise DataError(row.where, "prompt, completion", got, "both strings or both lists of messages", SKIP)


def tools_of(row: Row) -> tuple[dict[str, Any], ...]:
    """The `tools` column: a list of JSON schemas, or that list written as JSON."""
    if not row.fields.get("tools"):
        return ()
    tools = parsed(row, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(row.where, "tools", short(tools), "a list of JSON schemas", SKIP)
    return tuple(tools)


def string(row: Row, field: str) -> str:
    """A column that must hold text; absent is empty."""
    value = row.fields.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(row.where, field, f"{type(value).__name__} {short(value)}", "a string", SKIP)
    return value


def listed(row: Row, field: str) -> list[Any]:
    """A column that must hold a list with something in it (or that list written as JSON, as csv has it)."""
    value = parsed(row, field)
    if not isinstance(value, list) or not value:
        raise DataError(row.where, field, f"{type(value).__name__} {short(value)}", "a list of messages", SKIP)
    return value


def parsed(row: Row, field: str) -> Any:
    """The column's value; a string that is a JSON list of objects (csv has no other way) is parsed."""
    value = row.fields[field]
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
