"""Well-known instruction sets, by the columns that their files have: Alpaca, Dolly, FLAN, ShareGPT, transcripts as in
HH-RLHF, and the rated completions of UltraFeedback.
"""

import json
import math
import re
from typing import Any

from jaxft.data.errors import DataError, short
from jaxft.data.forms import Conversation, conversation, listed, string
from jaxft.data.records import SKIP, Row


def from_sharegpt(row: Row) -> Conversation:
    """`{"conversations": [{"from": "human", "value": …}, …]}`; messages with role and content are accepted too."""
    turns = enumerate(listed(row, "conversations"))
    messages = [sharegpt_message(row, f"conversations[{i}]", item) for i, item in turns]
    return conversation(row, "conversations", with_system(row, messages))


def from_alpaca(row: Row) -> Conversation:
    """`{"instruction", "input", "output"}`, with `system` and `history` where present."""
    return exchange(row, "instruction", "input", "output")


def from_dolly(row: Row) -> Conversation:
    """`{"instruction", "context", "response", "category"}`."""
    return exchange(row, "instruction", "context", "response")


def exchange(row: Row, ask: str, about: str, reply: str) -> Conversation:
    """An instruction, what it is about (if anything), and the reply, from the columns of these names."""
    instruction, given, output = string(row, ask), string(row, about), string(row, reply)
    messages: list[dict[str, Any]] = []
    for past in row.fields.get("history") or []:
        if not isinstance(past, list | tuple) or len(past) != 2:
            raise DataError(row.where, "history", short(past), "pairs of instruction and answer", SKIP)
        messages += [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}]
    both = f"{instruction}\n\n{given}" if given.strip() else instruction
    # The alpaca template shows the two parts under headings of their own.
    messages.append({"role": "user", "content": both, "instruction": instruction, "input": given})
    messages.append({"role": "assistant", "content": output})
    return conversation(row, reply, with_system(row, messages))


def from_flan(row: Row) -> Conversation:
    """`{"inputs", "targets"}`, whatever the columns that name the task: an exchange of one turn each."""
    messages = [
        {"role": "user", "content": string(row, "inputs")},
        {"role": "assistant", "content": string(row, "targets")},
    ]
    return conversation(row, "targets", messages, places=("inputs", "targets"))


def transcript(row: Row, field: str) -> list[dict[str, Any]]:
    """The turns of a text such as `\n\nHuman: Hi\n\nAssistant: Hello`, as messages."""
    before, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", string(row, field))
    if before.strip() or not turns:
        raise DataError(row.where, field, short(before or ""), "`\\n\\nHuman: ...\\n\\nAssistant: ...`", SKIP)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def is_transcript(text: Any) -> bool:
    """Whether a value is such a text."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def rated(row: Row) -> list[tuple[float, int, str]]:
    """(score, index, response) of UltraFeedback's completions, best first; ties in the order of the row.

    The score is `overall_score`; where there is none, `fine-grained_score`, or the mean of the ratings of all aspects
    that it is made of. A completion without any is left out."""
    found = []
    for i, item in enumerate(listed(row, "completions")):
        place = f"completions[{i}]"
        if not isinstance(item, dict) or not isinstance(item.get("response"), str):
            raise DataError(row.where, place, short(item), "an object with a `response` and its ratings", SKIP)
        score = score_of(item)
        if not math.isnan(score):
            found.append((score, i, item["response"]))
    return sorted(found, key=lambda each: (-each[0], each[1]))


def score_of(completion: dict[str, Any]) -> float:
    """The score of one completion; NaN where it has none (`N/A`)."""
    for name in ("overall_score", "fine-grained_score"):
        if not math.isnan(number(completion.get(name))):
            return number(completion[name])
    aspects = completion.get("annotations")
    aspects = aspects.values() if isinstance(aspects, dict) else ()
    ratings = [number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    ratings = [rating for rating in ratings if not math.isnan(rating)]
    return sum(ratings) / len(ratings) if ratings else math.nan


def number(value: Any) -> float:
    """A number, or one as text; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def with_system(row: Row, messages: list[Any]) -> list[Any]:
    """The messages after the row's own `system` column, if there is one."""
    system = row.fields.get("system")
    there = isinstance(system, str) and system.strip()
    return [{"role": "system", "content": system}, *messages] if there else messages


def sharegpt_message(row: Row, place: str, item: Any) -> Any:
    """One ShareGPT turn as a message."""
    if not isinstance(item, dict) or "from" not in item:
        return item
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    role, value = SHAREGPT_ROLES.get(item["from"]), item.get("value")
    if role is None:
        expected = f"one of {', '.join(SHAREGPT_ROLES)}"
        raise DataError(row.where, f"{place}.from", short(item["from"]), expected, SKIP)
    if item["from"] != "function_call":
        return {"role": role, "content": value, **rest}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        raise DataError(row.where, f"{place}.value", short(value), "a call as JSON", SKIP) from None
    return {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


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
