"""The rules for chat messages: which roles there are, in what order, and what a message may hold."""

import json
from collections.abc import Sequence
from typing import Any

from jaxft.data.errors import DataError, short

REMEDY = "Mend the row, or set data.on_error=skip."
# What may follow what. Nothing but a system message may stand before the first user; a tool answers a call.
FOLLOWS = {
    "": ("system", "developer", "user"),
    "system": ("developer", "user"),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
REASONING = ("reasoning_content", "thinking", "reasoning")


def take_flag(where: str, place: str, message: dict[str, Any]) -> tuple[dict[str, Any], bool | None]:
    """Split off the message's own flag: `train` (true or false), or OpenAI's `weight` (0 or 1)."""
    flag = message.get("train")
    if flag is None:
        flag = message.get("weight")
    if flag is not None and flag not in (0, 1):
        raise DataError(where, f"{place}.train", short(flag), "true or false (or a `weight` of 0 or 1)", REMEDY)
    rest = {key: value for key, value in message.items() if key not in ("train", "weight") and value is not None}
    if flag and message["role"] != "assistant":
        got = f"true on a {message['role']} message"
        raise DataError(where, f"{place}.train", got, "true on assistant messages alone", "Use data.loss_on=all.")
    return rest, None if flag is None else bool(flag)


def normalise(where: str, place: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as a string and the arguments of its tool calls as objects."""
    role = message["role"]
    if role not in FOLLOWS or not role:
        expected = f"one of {', '.join(name for name in FOLLOWS if name)}"
        raise DataError(where, f"{place}.role", short(role), expected, REMEDY)
    calls = message.get("tool_calls") or []
    if "content" not in message and not calls:
        raise DataError(where, f"{place}.content", "nothing", "text", REMEDY)
    content = text_of(where, f"{place}.content", message.get("content", ""))
    if role == "assistant" and not calls and not content.strip():
        raise DataError(where, f"{place}.content", "an empty completion", "something to learn", REMEDY)
    clean = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            expected = "a list of calls, on an assistant message"
            raise DataError(where, f"{place}.tool_calls", short(calls), expected, REMEDY)
        clean["tool_calls"] = [call_of(where, f"{place}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return clean


def text_of(where: str, place: str, content: Any) -> str:
    """Content as text: a string, or OpenAI's list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                expected = "a part of type text (images are not read)"
                raise DataError(where, f"{place}[{i}]", short(part), expected, REMEDY)
        return "".join(part["text"] for part in content)
    raise DataError(where, place, f"{type(content).__name__} {short(content)}", "a string", REMEDY)


def call_of(where: str, place: str, call: Any) -> dict[str, Any]:
    """A tool call as `{"type": "function", "function": {"name", "arguments"}}` with arguments as an object."""
    call = dict(call) if isinstance(call, dict) else {}
    function = dict(call["function"]) if isinstance(call.get("function"), dict) else call
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            arguments = None
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        expected = "a function's name and its arguments (an object, or one as JSON)"
        raise DataError(where, place, short(call), expected, REMEDY)
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments", "type")}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def check_order(where: str, field: str, messages: list[dict[str, Any]], places: Sequence[str]) -> None:
    """Roles follow each other as `FOLLOWS` says, and the assistant has the last word."""
    before = ""
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in FOLLOWS[before]:
            after = f"after {before!r}" if before else "as the first message"
            expected = " or ".join(repr(name) for name in FOLLOWS[before])
            raise DataError(where, f"{places[i]}.role", f"{role!r} {after}", f"{expected} (roles in order)", REMEDY)
        if role == "tool" and before == "assistant" and not messages[i - 1].get("tool_calls"):
            got = "'tool' after an assistant message without tool_calls"
            raise DataError(where, f"{places[i]}.role", got, "a call for the tool to answer", REMEDY)
        before = role
    if before != "assistant":
        expected = "the assistant's (nothing else is learnt)"
        raise DataError(where, field, f"{before!r} as the last message", expected, REMEDY)
