r"""Mathematical answers: 1 for a completion whose final answer equals the right one, 0 for others.

The answer is what is in the last ``\boxed{}``, or else the last number. Answers that are equal as numbers or as written
are right; of others, math-verify (if installed: the extra `math`) says whether they are equal as mathematics. It runs
in a process of its own, which is ended where an expression takes too long.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxft.rewards import answers, numbers, settings
from jaxft.rewards.algebra import client as algebra
from jaxft.rewards.settings import Function, Weighted


@dataclass(frozen=True, kw_only=True)
class Grading:
    """How mathematical answers are compared."""

    answer: str | None = None
    """Column of the right answer: a number, or text, of which what is boxed or stands after #### counts, if anything
    does. Default: answer, or else solution. A row without one has no reward."""
    extract: Literal["auto", "boxed", "number"] = "auto"
    """Where the completion's answer is: boxed: in the last \\boxed{}; number: its last number; auto: boxed, or else
    after the last ####, or else the last number."""
    algebra: Literal["auto", "math_verify", "none"] = "auto"
    """Whether math-verify is asked of answers that are not equal as numbers or as written; auto: if it is
    installed."""
    tolerance: float = 1e-6
    """Greatest relative difference of equal numbers."""
    timeout: float = 5.0
    """Seconds that math-verify may take over one answer, which is wrong after them."""
    tags: tuple[str, str] = answers.TAGS
    """What stands around the reasoning, which is not judged. Where it never ends there is no answer."""

    def __post_init__(self) -> None:
        settings.check_tags(self.tags)
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: got {self.tolerance}; expected a number from 0 to below 1")
        if not self.timeout > 0:
            raise ValueError(f"timeout: got {self.timeout}; expected seconds above 0")


@dataclass(frozen=True, kw_only=True)
class Math(Grading, Weighted):
    """Whether the answer to a mathematical question is right."""


def make(config: Math) -> Function:
    """1 or 0 for each completion; None where the row has no right answer. Raises ValueError."""
    return grader(config)


def grader(config: Grading) -> Function:
    """See `make`."""
    asked = algebra.pool(config.timeout) if _algebra(config) else None

    def math(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        del prompts
        name = config.answer or ("answer" if "answer" in columns or "solution" not in columns else "solution")
        rights = [gold(value) for value in settings.column(columns, name, "answer")]
        saids = [said(config, text) for text in completions]
        return [
            None if right is None else float(found is not None and _equal(config, found, right, asked))
            for found, right in zip(saids, rights, strict=True)
        ]

    return math


def _algebra(config: Grading) -> bool:
    installed = algebra.installed()
    if config.algebra == "math_verify" and not installed:
        raise ValueError("algebra: got math_verify, which is not installed: pip install 'jaxft[math]'")
    return config.algebra != "none" and installed


def gold(value: Any) -> str | None:
    """The right answer that a column holds; None where it holds none. Raises ValueError for what is no answer."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"answer: the row has {value!r}; expected text or a number")
    text = str(value)
    if (found := answers.boxed(text)) is not None:
        return found
    return text.rpartition("####")[2].strip()


def said(config: Grading, text: str) -> str | None:
    """The answer of a completion; None if it gives none."""
    final = answers.parts(text, config.tags)[1]
    if not final:
        return None
    found = None if config.extract == "number" else answers.boxed(final)
    if found is not None or config.extract == "boxed":
        return found or None
    if config.extract == "auto" and "####" in final:
        lines = final.rpartition("####")[2].strip().splitlines()
        return lines[0] if lines else None
    return answers.last_number(final)


def _equal(config: Grading, found: str, right: str, asked: algebra.Pool | None) -> bool:
    if numbers.same(found, right, config.tolerance):
        return True
    # of words it would make products of letters, of which any order is equal
    words = re.fullmatch(r"[a-z]{3,}( [a-z]+)*", answers.normalised(right)) is not None
    return asked is not None and not words and asked.equal(found, right)
