"""Recognise how a row is written and convert it: to a document, a prompt with its completion, a conversation, or what
judges completions.

The format is recognised once for a data set, from its first good row; a later row that lacks the format's fields is
then an error and not, silently, a row of another format. Which formats there are depends on the rows that an objective
asks for (`Objective.rows`): an objective on labelled completions takes pairs apart.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxft.data import instructions, preferences
from jaxft.data.errors import DataError
from jaxft.data.forms import (
    Conversation,
    Document,
    Form,
    Pair,
    Preference,
    conversation,
    from_pair,
    listed,
    string,
    taught,
)
from jaxft.data.records import SKIP, Row

__all__ = ["Conversation", "Document", "Form", "Pair", "convert", "detect"]


def detect(rows: Iterable[Row | DataError], where: str, wanted: str = "tokens") -> str:
    """The format of the first good row, among those for the `wanted` rows; the first that claims it."""
    keys: list[str] = []
    bad: list[DataError] = []
    for row in rows:
        if isinstance(row, DataError):
            bad.append(row)
            continue
        keys = sorted(row.fields)
        for name, format in FORMATS[wanted].items():
            if format.claims(row.fields):
                return name
        break
    if bad and not keys:
        raise bad[0]
    known = "; ".join(f"{name}: {', '.join(format.fields)}" for name, format in FORMATS[wanted].items())
    got = f"columns {keys}" if keys else "no row that can be read"
    remedy = "Name the columns with data.columns, such as {question: prompt, answer: completion}."
    if wanted == "tokens" and "chosen" in keys:
        remedy = "Preference data (chosen, rejected) is for preference objectives, not for sft"
        remedy += " (data.format=preference learns the chosen ones)."
    raise DataError(where, "", got, f"one of the known formats ({known})", remedy)


def convert(row: Row, name: str, wanted: str = "tokens") -> Form | None:
    """The row in its internal form; None where it holds nothing to compare. Raises DataError naming the field."""
    format = FORMATS[wanted][name]
    for field in format.fields:
        if row.fields.get(field) is None:
            got = f"columns {sorted(key for key, value in row.fields.items() if value is not None)}"
            raise DataError(row.where, field, f"nothing ({got})", f"the field, as the format {name} has it", SKIP)
    return format.convert(row)


def check(name: str, wanted: str) -> None:
    """Refuse a `data.format` that cannot give the `wanted` rows."""
    if name not in FORMATS[wanted]:
        expected = f"one of {', '.join(FORMATS[wanted])}, for an objective on {wanted}"
        raise DataError("", "data.format", repr(name), expected, "Set data.format=auto, or change the objective.")


def from_text(row: Row) -> Document:
    """`{"text": …}`."""
    text = string(row, "text")
    if not text.strip():
        raise DataError(row.where, "text", "an empty text", "some text", SKIP)
    return Document(text)


def from_messages(row: Row) -> Conversation:
    """`{"messages": [{"role": …, "content": …}, …]}`, as OpenAI writes it."""
    return conversation(row, "messages", listed(row, "messages"))


def from_best(row: Row) -> Conversation:
    """UltraFeedback's best completion."""
    best = instructions.rated(row)[:1]
    messages = [{"role": "user", "content": row.fields["instruction"]}]
    messages += [{"role": "assistant", "content": text} for _, _, text in best]
    places = ["instruction", *(f"completions[{i}]" for _, i, _ in best)]
    return conversation(row, "completions", messages, places=places)


def chosen(convert: Callable[[Row], Preference | None]) -> Callable[[Row], Form | None]:
    """The preferred completion alone, as one to learn."""
    return lambda row: taught(convert(row))


Fields = dict[str, Any]


class Format(NamedTuple):
    """The columns of a format, how a row becomes a form, and whether a row is of this format."""

    fields: tuple[str, ...]
    convert: Callable[[Row], Form | None]
    claims: Callable[[Fields], bool]


def first(fields: tuple[str, ...], convert: Callable[[Row], Form | None]) -> Format:
    """A format that its first column is enough to recognise: a row without the others is then an error."""
    return Format(fields, convert, lambda row: fields[0] in row)


def continues(row: Fields) -> bool:
    """Whether a row is of prompt and completion, and not of a preference with its prompt."""
    return "prompt" in row and ("completion" in row or not {"chosen", "rejected"} <= row.keys())


def rates(row: Fields) -> bool:
    """Whether a row is of UltraFeedback."""
    return {"instruction", "completions"} <= row.keys() and "output" not in row


def is_dolly(row: Fields) -> bool:
    """Whether a row is of Dolly and not of Alpaca."""
    return {"instruction", "response"} <= row.keys() and "output" not in row


def is_dialogue(row: Fields) -> bool:
    """Whether a row holds two transcripts."""
    return instructions.is_transcript(row.get("chosen")) and instructions.is_transcript(row.get("rejected"))


RATED, COMPARED = ("instruction", "completions"), ("chosen", "rejected")
JUDGED = {
    "hh_rlhf": Format(COMPARED, preferences.from_transcripts, is_dialogue),
    "preference": first(COMPARED, preferences.from_preference),
    "ultrafeedback": Format(RATED, preferences.from_ultrafeedback, rates),
}
FORMATS: dict[str, dict[str, Format]] = {
    "tokens": {
        "messages": first(("messages",), from_messages),
        "conversations": first(("conversations",), instructions.from_sharegpt),
        "prompt_completion": Format(("prompt", "completion"), from_pair, continues),
        "ultrafeedback": Format(RATED, from_best, rates),
        "dolly": Format(("instruction", "response"), instructions.from_dolly, is_dolly),
        "alpaca": first(("instruction", "output"), instructions.from_alpaca),
        "text": first(("text",), from_text),
        "flan": first(("inputs", "targets"), instructions.from_flan),
        "hh_rlhf": Format(COMPARED, chosen(preferences.from_transcripts), is_dialogue),
        # Learning only what is preferred must be asked for.
        "preference": Format(COMPARED, chosen(preferences.from_preference), lambda row: False),
    },
    "pairs": JUDGED,
    "labelled": {"labelled": first(("completion", "prompt", "label"), preferences.from_labelled)} | JUDGED,
    "steps": {"stepwise": first(("completions", "prompt", "labels"), preferences.from_stepwise)},
}
