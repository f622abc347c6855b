"""Rows that judge: two completions of which one is preferred, a completion with a label, a solution step by step.

Chosen and rejected continue the same prompt. Where no column holds it, it is what both begin with: the messages they
share, or the text they share up to the last word. Both may repeat a prompt that a column holds (UltraFeedback does).
"""

import hashlib
import math
from typing import Any

from jaxft.data import instructions
from jaxft.data.errors import DataError, short
from jaxft.data.forms import Conversation, Labelled, Pair, Preference, Stepwise, conversation, from_pair, parsed
from jaxft.data.records import SKIP, Row

UNBROKEN = "\u2e80"
"""From this character on, scripts write words without spaces."""


def from_preference(row: Row) -> Preference:
    """`{"prompt"?, "chosen", "rejected", "margin"?}`: all strings, or all messages."""
    prompt = None if row.fields.get("prompt") is None else parsed(row, "prompt")
    chosen, rejected = parsed(row, "chosen"), parsed(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        return of_texts(row, prompt, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list) and (prompt is None or isinstance(prompt, str | list)):
        return of_messages(row, prompt, chosen, rejected)
    names = [name for name in ("prompt", "chosen", "rejected") if row.fields.get(name) is not None]
    got = ", ".join(type(row.fields[name]).__name__ for name in names)
    raise DataError(row.where, ", ".join(names), got, "all strings or all lists of messages", SKIP)


def from_transcripts(row: Row) -> Preference:
    """`{"chosen", "rejected"}` as HH-RLHF writes them: whole dialogues in one text."""
    return of_messages(row, None, instructions.transcript(row, "chosen"), instructions.transcript(row, "rejected"))


def from_ultrafeedback(row: Row) -> Preference | None:
    """`{"instruction", "completions"}`: the best completion, and one of those rated lower; None if there is none.

    Which of the lower ones is decided by the row's content (Tunstall et al. 2023, arXiv:2310.16944, draw it: the worst
    alone would be too easy)."""
    found = instructions.rated(row)
    worse = [each for each in found if each[0] < found[0][0]]
    if not worse:
        return None
    instruction = row.fields["instruction"]
    draw = hashlib.blake2b(str(instruction).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    best, other = found[0], worse[int.from_bytes(draw, "little") % len(worse)]
    user = {"role": "user", "content": instruction}
    chosen, rejected = (
        conversation(
            row, "completions", [user, {"role": "assistant", "content": text}], 1, ("instruction", f"completions[{i}]")
        )
        for _, i, text in (best, other)
    )
    return Preference(chosen, rejected, margin_of(row))


def of_texts(row: Row, prompt: str | None, chosen: str, rejected: str) -> Preference:
    """Strings; without a prompt it is what both begin with."""
    refuse_equal(row, chosen, rejected)
    if prompt is None:
        shared = shared_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise DataError(row.where, field, "an empty completion", "something to compare", SKIP)
    return Preference(Pair(prompt, chosen), Pair(prompt, rejected), margin_of(row))


def shared_text(a: str, b: str) -> int:
    """How many characters two texts share from the start, less a word (and the space before it) that both share only
    in part."""
    end = min(len(a), len(b))
    size = next((i for i in range(end) if a[i] != b[i]), end)
    if not a[size:].strip() or not b[size:].strip():  # one text is how the other begins: its last word is left of it
        size = len(a[:size].rstrip())
        while size and not a[size - 1].isspace():
            size -= 1
    while size and wordy(a[size - 1]) and (wordy(a[size]) or wordy(b[size])):
        size -= 1
    return size - 1 if size and a[size - 1] == " " else size


def wordy(character: str) -> bool:
    """Whether a character is of a word that white space or a sign ends."""
    return character.isalnum() and character < UNBROKEN


def of_messages(row: Row, prompt: str | list[Any] | None, chosen: list[Any], rejected: list[Any]) -> Preference:
    """Messages; a prompt of its own stands before both, unless both repeat it."""
    chosen, rejected = messages_of(row, "chosen", chosen), messages_of(row, "rejected", rejected)
    refuse_equal(row, chosen, rejected)
    if isinstance(prompt, list):
        given = messages_of(row, "prompt", prompt)
        shared = len(given)
        if not chosen[:shared] == rejected[:shared] == given:
            one, other = (joined(row, "prompt", given, *each) for each in (("chosen", chosen), ("rejected", rejected)))
            return Preference(one, other, margin_of(row))
    else:
        shared = shared_messages(chosen, rejected)
        if prompt is not None and prompt not in [each.get("content") for each in chosen[:shared]]:
            got = f"{short(prompt)}, a text that the messages of chosen and rejected do not begin with"
            raise DataError(row.where, "prompt", got, "a list of messages, as chosen and rejected are", SKIP)
    one = joined(row, "chosen", chosen[:shared], "chosen", chosen[shared:])
    other = joined(row, "rejected", rejected[:shared], "rejected", rejected[shared:])
    return Preference(one, other, margin_of(row))


def messages_of(row: Row, field: str, messages: list[Any]) -> list[dict[str, Any]]:
    """A list of messages, ShareGPT's renamed."""
    if not messages:
        raise DataError(row.where, field, "an empty list", "messages", SKIP)
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(row.where, f"{field}[{i}]", short(message), "an object with `role` and `content`", SKIP)
    return [instructions.sharegpt_message(row, f"{field}[{i}]", each) for i, each in enumerate(messages)]


def shared_messages(a: list[Any], b: list[Any]) -> int:
    """How many messages two chats share from the start, at least one being left of each."""
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return min(size, len(a) - 1, len(b) - 1)


def joined(row: Row, before: str, prompt: list[Any], field: str, completion: list[Any]) -> Conversation:
    """A prompt with a completion; errors name the column that each message comes from."""
    start = len(prompt) if before == field else 0
    places = [f"{before}[{i}]" for i in range(len(prompt))]
    places += [f"{field}[{start + i}]" for i in range(len(completion))]
    chat = conversation(row, field, [*prompt, *completion], len(prompt), places)
    refuse_flags(row, chat)
    return chat


def from_labelled(row: Row) -> Labelled:
    """`{"prompt", "completion", "label"}`: a completion that is desirable (true) or not (false)."""
    form = from_pair(row)
    refuse_flags(row, form)
    label = row.fields["label"]
    if not isinstance(label, bool):
        raise DataError(row.where, "label", f"{type(label).__name__} {short(label)}", "true or false", SKIP)
    return Labelled(form, label)


def from_stepwise(row: Row) -> Stepwise:
    """`{"prompt", "completions", "labels"}`: a problem, the steps of a solution, and whether each is right."""
    prompt, steps, labels = parsed(row, "prompt"), row.fields["completions"], row.fields["labels"]
    for field, values, kind, name in (
        ("completions", steps, str, "a list of steps, each a string"),
        ("labels", labels, bool, "a list of true and false"),
    ):
        if not isinstance(values, list) or not values:
            raise DataError(row.where, field, f"{type(values).__name__} {short(values)}", name, SKIP)
        for i, value in enumerate(values):
            if not isinstance(value, kind):
                raise DataError(row.where, f"{field}[{i}]", f"{type(value).__name__} {short(value)}", name, SKIP)
    for i, step in enumerate(steps):
        if not step.strip():
            raise DataError(row.where, f"completions[{i}]", "an empty completion", "a step", SKIP)
    if len(steps) != len(labels):
        got = f"{len(steps)} steps and {len(labels)} labels"
        raise DataError(row.where, "completions, labels", got, "a label for each step", SKIP)
    if isinstance(prompt, list):
        reply = {"role": "assistant", "content": "\n".join(steps)}
        places = [*(f"prompt[{i}]" for i in range(len(prompt))), "completions"]
        prompt = conversation(row, "prompt", [*prompt, reply], len(prompt), places)
    elif not isinstance(prompt, str):
        raise DataError(row.where, "prompt", f"{type(prompt).__name__} {short(prompt)}", "text or messages", SKIP)
    return Stepwise(prompt, tuple(steps), tuple(labels))


def margin_of(row: Row) -> float | None:
    """The `margin` column: by how much the chosen one is better."""
    margin = row.fields.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(row.where, "margin", f"{type(margin).__name__} {short(margin)}", "a finite number", SKIP)
    return float(margin)


def refuse_equal(row: Row, chosen: Any, rejected: Any) -> None:
    """Refuse a comparison of a thing with itself."""
    if chosen == rejected:
        got = f"the same in both: {short(chosen)}"
        raise DataError(row.where, "chosen, rejected", got, "two different completions", SKIP)


def refuse_flags(row: Row, form: Pair | Conversation) -> None:
    """Refuse `train` and `weight` on messages: a completion is judged whole."""
    if isinstance(form, Conversation) and any(flag is not None for flag in form.train):
        got = "flags on messages (`train` or `weight`)"
        raise DataError(row.where, "train", got, "none: a completion is judged whole", "Take them out of the data.")
