"""How a completion is written: reasoning in its tags, a regex, JSON of a schema, an exact answer, a chosen letter.

Each gives 1 to a completion that is so, and 0 to others.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxft.rewards import answers, schema, settings
from jaxft.rewards.settings import Final, Function, Weighted


@dataclass(frozen=True, kw_only=True)
class ThinkFormat(Final, Weighted):
    """Whether a completion begins with reasoning in its tags."""

    opened: bool = False
    """Whether the chat template writes the first tag, so that the completion begins inside the reasoning."""


def think(config: ThinkFormat) -> Function:
    """1 for a completion that begins with the first tag, has it once, and the second somewhere after it."""
    first, last = config.tags

    def think_format(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        del prompts, columns
        texts = [first + text if config.opened else text for text in completions]
        return [float(t.startswith(first) and t.count(first) == 1 and last in t[len(first) :]) for t in texts]

    return think_format


@dataclass(frozen=True, kw_only=True)
class Pattern(Final, Weighted):
    """Whether a completion matches a regex."""

    pattern: str
    """The regex; . matches line ends too."""
    match: Literal["full", "search"] = "full"
    """Whether all of the text must match, or some part of it."""
    of: Literal["completion", "answer"] = "completion"
    """Whether the text is all of the completion, or what follows the reasoning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: got {self.pattern!r}, which is no regex ({error})") from None


def pattern(config: Pattern) -> Function:
    """1 where the regex matches. A pattern that backtracks without end stalls the run: nothing stops it."""
    made = re.compile(config.pattern, re.DOTALL)
    found = made.fullmatch if config.match == "full" else made.search

    def regex(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        del prompts, columns
        texts = completions if config.of == "completion" else [answers.parts(t, config.tags)[1] for t in completions]
        return [float(text is not None and found(text) is not None) for text in texts]

    return regex


@dataclass(frozen=True, kw_only=True)
class JSONSchema(Final, Weighted):
    """Whether the final answer is JSON that a schema allows."""

    schema: dict[str, Any] = field(default_factory=dict)
    """The JSON schema (draft 2020-12). Empty: any JSON."""
    path: str | None = None
    """File that holds the schema instead."""
    column: str | None = None
    """Column that holds each row's own schema instead, as a mapping or as text."""
    fenced: bool = True
    """Whether the JSON may stand in a ```json block, of which the last counts, with text around it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [bool(self.schema), self.path is not None, self.column is not None]
        if sum(given) > 1:
            raise ValueError("schema: got more than one of schema, path and column; expected one of them")


_FENCE = re.compile(r"^```[ \t]*(?:json)?[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE)


def json_schema(config: JSONSchema) -> Function:
    """1 for JSON that is valid. Raises ValueError for a schema that is none or, without the package jsonschema, for
    keywords that `jaxft.rewards.schema` does not know."""
    fixed = config.schema
    if config.path is not None:
        fixed = schema.read(Path(config.path).read_text(encoding="utf-8"), config.path)
    shared = None if config.column is not None else schema.validator(fixed)

    def valid(text: str, allows: schema.Validator) -> float:
        final = answers.parts(text, config.tags)[1]
        if not final:
            return 0.0
        blocks = _FENCE.findall(final) if config.fenced else []
        try:
            value = json.loads(blocks[-1] if blocks else final, parse_constant=_no_number)
            return float(allows(value))
        except (ValueError, RecursionError):
            return 0.0

    def json_schema(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        del prompts
        if shared is not None:
            return [valid(text, shared) for text in completions]
        own = settings.column(columns, str(config.column), "column")
        checks = [schema.validator(schema.read(value, f"column {config.column}")) for value in own]
        return [valid(text, allows) for text, allows in zip(completions, checks, strict=True)]

    return json_schema


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@dataclass(frozen=True, kw_only=True)
class ExactMatch(Final, Weighted):
    """Whether the final answer is the right one, letter by letter."""

    answer: str = "answer"
    """Column of the right answer, or of a list of them. A row without one has no reward."""
    extract: str | None = None
    """Regex whose last match in the final answer (its first group, if it has one) is what is compared."""
    normalise: bool = True
    """Whether case, white space, quotes, a full stop at the end and commas in numbers are overlooked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.extract or "")
        except re.error as error:
            raise ValueError(f"extract: got {self.extract!r}, which is no regex ({error})") from None


def exact(config: ExactMatch) -> Function:
    """1 for the right answer; None where the row has none. Raises ValueError."""
    alike = answers.normalised if config.normalise else str.strip

    def exact_match(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        del prompts
        found = []
        for text, value in zip(completions, settings.column(columns, config.answer, "answer"), strict=True):
            rights = [str(v) for v in (value if isinstance(value, list | tuple) else [value]) if v is not None]
            said = answers.parts(text, config.tags)[1]
            said = said if said is None or config.extract is None else answers.last_match(config.extract, said)
            right = said is not None and alike(said) in map(alike, rights)
            found.append(float(right) if rights else None)
        return found

    return exact_match


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Final, Weighted):
    """Whether the chosen letter is the right one."""

    answer: str = "answer"
    """Column of the right choice: its letter, or its number counted from 0. A row without one has no reward."""
    letters: str = "ABCDEFGHIJ"
    """The letters of the choices in order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.letters.isalpha() or len({*self.letters.upper()}) != len(self.letters):
            raise ValueError(f"letters: got {self.letters!r}; expected different letters such as ABCD")


def choice(config: MultipleChoice) -> Function:
    """1 for the right letter; 0 for another or none; None where the row has no answer. Raises ValueError."""
    letters = config.letters.upper()

    def right(value: Any) -> str | None:
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
            return letters[value]
        text = str(value).strip("() .\n").upper()
        if len(text) != 1 or text not in letters:
            raise ValueError(f"answer: the row has {value!r}; expected one of {', '.join(letters)}, or its number")
        return text

    def multiple_choice(
        prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        del prompts
        rights = [right(value) for value in settings.column(columns, config.answer, "answer")]
        finals = [answers.parts(text, config.tags)[1] for text in completions]
        return [
            None if wanted is None else float(letter(final or "", letters) == wanted)
            for final, wanted in zip(finals, rights, strict=True)
        ]

    return multiple_choice


def letter(text: str, letters: str) -> str | None:
    r"""The letter that an answer chooses: the last in ``\boxed{}``, else the last after "answer is" or "answer:", else
    the one that the text begins with ("B", "(B)", "B. Paris"), else the only one in brackets; None if none."""
    one = rf"[(\[]?([{letters}{letters.lower()}])[)\]]?"
    if (inside := answers.boxed(text)) is not None:
        found = re.fullmatch(rf"(?:\\text\w*\s*\{{)?\s*{one}\s*\.?\s*\}}?(?:[.:)]?\s.*)?", inside, re.DOTALL)
        return found[1].upper() if found else None
    bare = re.sub(r"[*_`$]", "", text).strip()
    told = re.findall(
        rf"(?i:\b(?:answer|choice|option)(?:\s+is|\s*[:=]))\s*(?:(?i:option|choice)\s+)?{one}(?![\w'])", bare
    )
    if told:
        return told[-1].upper()
    if begins := re.match(rf"(?:{one}|([{letters}])[).:]\s.*|\(([{letters}])\).*)$", bare, re.DOTALL):
        return next(group for group in begins.groups() if group).upper()
    bracketed = {*re.findall(rf"\(([{letters}])\)", bare)}
    return bracketed.pop() if len(bracketed) == 1 else None
