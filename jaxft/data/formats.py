"""Recognise how a row is written and convert it: to a document, a prompt with its completion, or a conversation.

The format is recognised once for a data set, from its first good row; a later row that lacks the format's fields is
then an error and not, silently, a row of another format. Messages keep fields that only a template understands
(`reasoning_content`, `name`).
"""

import json
from collections.abc import Iterable
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


Form = Document | Pair | Conversation

FIELDS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


def detect(rows: Iterable[Row | DataError], where: str) -> str:
    """The format of the first good row, in the order of `FIELDS`; the first field of a format claims the row."""
    keys: list[str] = []
    for row in rows:
        if isinstance(row, DataError):
            continue
        keys = sorted(row.fields)
        for name, fields in FIELDS.items():
            if fields[0] in row.fields:
                return name
        break
    known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FIELDS.items())
    got = f"columns {keys}" if keys else "no row that can be read"
    remedy = "Name the columns with data.columns, such as {question: prompt, answer: completion}."
    if "chosen" in keys:
        remedy = "Preference data (chosen, rejected) is for preference objectives, not for sft."
    raise DataError(where, "", got, f"one of the known formats ({known})", remedy)


def convert(row: Row, name: str) -> Form:
    """The row in its internal form; raises DataError naming the field at fault."""
    for field in FIELDS[name]:
        if row.fields.get(field) is None:
            got = f"columns {sorted(key for key, value in row.fields.items() if value is not None)}"
            raise DataError(row.where, field, f"nothing ({got})", f"the field, as the format {name} has it", SKIP)
    return CONVERT[name](row)


def from_text(row: Row) -> Document:
    """`{"text": …}`."""
    text = string(row, "text")
    if not text.strip():
        raise DataError(row.where, "text", "an empty text", "some text", SKIP)
    return Document(text)


def from_pair(row: Row) -> Form:
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


def from_messages(row: Row) -> Conversation:
    """`{"messages": [{"role": …, "content": …}, …]}`, as OpenAI writes it."""
    return conversation(row, "messages", listed(row, "messages"))


def from_sharegpt(row: Row) -> Conversation:
    """`{"conversations": [{"from": "human", "value": …}, …]}`; messages with role and content are accepted too."""
    messages: list[Any] = [sharegpt_message(row, i, item) for i, item in enumerate(listed(row, "conversations"))]
    return conversation(row, "conversations", with_system(row, messages))


def from_alpaca(row: Row) -> Conversation:
    """`{"instruction", "input", "output"}`, with `system` and `history` where present."""
    instruction, given, output = string(row, "instruction"), string(row, "input"), string(row, "output")
    messages: list[dict[str, Any]] = []
    for past in row.fields.get("history") or []:
        if not isinstance(past, list | tuple) or len(past) != 2:
            raise DataError(row.where, "history", short(past), "pairs of instruction and answer", SKIP)
        messages += [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}]
    both = f"{instruction}\n\n{given}" if given.strip() else instruction
    # The alpaca template shows the two parts under headings of their own.
    messages.append({"role": "user", "content": both, "instruction": instruction, "input": given})
    messages.append({"role": "assistant", "content": output})
    return conversation(row, "output", with_system(row, messages))


def with_system(row: Row, messages: list[Any]) -> list[Any]:
    """The messages after the row's own `system` column, if there is one."""
    system = row.fields.get("system")
    there = isinstance(system, str) and system.strip()
    return [{"role": "system", "content": system}, *messages] if there else messages


def sharegpt_message(row: Row, i: int, item: Any) -> Any:
    """One ShareGPT turn as a message."""
    if not isinstance(item, dict) or "from" not in item:
        return item
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    role, value = SHAREGPT_ROLES.get(item["from"]), item.get("value")
    if role is None:
        expected = f"one of {', '.join(SHAREGPT_ROLES)}"
        raise DataError(row.where, f"conversations[{i}].from", short(item["from"]), expected, SKIP)
    if item["from"] != "function_call":
        return {"role": role, "content": value, **rest}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        raise DataError(row.where, f"conversations[{i}].value", short(value), "a call as JSON", SKIP) from None
    return {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def conversation(row: Row, field: str, messages: list[Any], given: int = 0) -> Conversation:
    """Check and normalise messages: known roles in order, text contents, flags taken out, tool calls as objects."""
    clean, flags = [], []
    for i, message in enumerate(messages):
        place = f"{field}[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(row.where, place, short(message), "an object with `role` and `content`", SKIP)
        message, flag = turns.take_flag(row.where, place, message)
        clean.append(turns.normalise(row.where, place, message))
        flags.append(flag)
    turns.check_order(row.where, field, clean)
    return Conversation(tuple(clean), tuple(flags), tools_of(row), given)


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


SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "tool": "tool",
}
CONVERT = {
    "messages": from_messages,
    "conversations": from_sharegpt,
    "prompt_completion": from_pair,
    "alpaca": from_alpaca,
    "text": from_text,
}
