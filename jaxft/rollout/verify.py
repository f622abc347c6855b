"""Checks of sampled completions: which of them are right, and which of those are kept to train on.

A completion is a text; where it reasons, `<think>...</think>` stands before its final answer, which alone is compared.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxft.rewards import answers

Judge = Callable[..., Sequence[float | None]]
"""``f(prompts, completions, **columns) -> [score or None, ...]``: every argument a list with one entry a completion;
None says nothing of it."""


@dataclass(frozen=True)
class VerifyConfig:
    """What a completion must be to be kept. What is not set is not asked for."""

    answer: str | None = None
    """Column of the right answer, such as answer: the final answer must equal it, but for case, white space, quotes, a
    full stop at the end, and commas between digits."""
    extract: str | None = None
    """Regex whose last match in the final answer (its first group, if it has one) is what is compared with the right
    answer, such as \\boxed\\{(.*?)\\}. Without a match a completion fails."""
    pattern: str | None = None
    """Regex that must be found in the final answer."""
    function: str | None = None
    """file.py:name of a function f(prompts, completions, **columns) that gives a number or None for each completion; or
    the name of a reward, such as math or code, that is asked with its defaults."""
    threshold: float = 0.5
    """Least number of the function that passes."""
    finished: bool = True
    """Whether a completion that was cut at generate.max_new_tokens fails."""
    max_tokens: int | None = None
    """Longest completion that passes, reasoning included."""
    reasoning: Literal["any", "required", "none"] = "any"
    """Whether a completion must, or must not, reason before its final answer."""
    tags: tuple[str, str] = answers.TAGS
    """What stands around the reasoning."""

    def __post_init__(self) -> None:
        for field in ("extract", "pattern"):
            try:
                re.compile(getattr(self, field) or "")
            except re.error as error:
                raise ValueError(f"verify.{field}: got {getattr(self, field)!r}, which is no regex ({error})") from None
        if self.extract is not None and self.answer is None:
            raise ValueError("verify.extract: nothing to compare with; give verify.answer, or use verify.pattern")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"verify.max_tokens: got {self.max_tokens}; expected at least 1")
        if not all(self.tags):
            raise ValueError(f"verify.tags: got {list(self.tags)}; expected two texts such as <think> and </think>")


class Sample(NamedTuple):
    """One completion."""

    text: str
    tokens: int
    """How many, the end token included."""
    finished: bool


class Verdict(NamedTuple):
    """What became of a sample."""

    score: float
    """1 for one that passes, or the function's number."""
    failed: str
    """Which check it failed; empty if none."""


def judged(
    config: VerifyConfig,
    prompt: Any,
    samples: Sequence[Sample],
    columns: Mapping[str, Any],
    function: Judge | None = None,
) -> list[Verdict]:
    """The verdict of each sample of one prompt. ``columns``: of its row. Raises ValueError for a missing answer, and
    for a function that gives something else than a number or None for each."""
    scores: Sequence[float | None] = [None] * len(samples)
    if function is not None and samples:
        repeated = {name: [value] * len(samples) for name, value in columns.items() if name not in RESERVED}
        scores = _numbers(config, function([prompt] * len(samples), [s.text for s in samples], **repeated), samples)
    right = None if config.answer is None else columns.get(config.answer)
    if config.answer is not None and not isinstance(right, str | int | float):
        raise ValueError(f"verify.answer: the row has {right!r} in column {config.answer}; expected text or a number")
    return [
        Verdict(0.0 if failed and score is None else 1.0 if score is None else float(score), failed)
        for sample, score in zip(samples, scores, strict=True)
        for failed in [_failed(config, sample, None if right is None else str(right), score, function is not None)]
    ]


RESERVED = ("prompts", "completions", "prompt", "completion")
"""Columns that a function is not given by their own names."""


def _numbers(config: VerifyConfig, found: Any, samples: Sequence[Sample]) -> list[float | None]:
    values = list(found) if isinstance(found, Sequence) else found
    fine = isinstance(values, list) and len(values) == len(samples)
    if not fine or not all(v is None or isinstance(v, int | float) for v in values):
        raise ValueError(f"verify.function: {config.function} gave {found!r}; expected {len(samples)} numbers or None")
    return values


def _failed(config: VerifyConfig, sample: Sample, right: str | None, score: float | None, asked: bool) -> str:
    """The first check that a sample fails."""
    reasoning, final = answers.parts(sample.text, config.tags)
    said = answers.last_match(config.extract, final) if config.extract is not None and final else final
    checks = {
        "cut": config.finished and not sample.finished,
        "too long": config.max_tokens is not None and sample.tokens > config.max_tokens,
        "no final answer": not final,
        "no reasoning": config.reasoning == "required" and not reasoning,
        "reasoning": config.reasoning == "none" and bool(reasoning),
        "pattern": config.pattern is not None and not re.search(config.pattern, final or "", re.DOTALL),
        "no answer found": right is not None and said is None,
        "wrong answer": right is not None
        and said is not None
        and answers.normalised(said) != answers.normalised(right),
        "function": score is not None and not score >= config.threshold,
        "not judged": asked and score is None and right is None and config.pattern is None,
    }
    return next((name for name, failed in checks.items() if failed), "")


def kept(samples: Sequence[Sample], verdicts: Sequence[Verdict], keep: Literal["best", "all", "first"]) -> list[int]:
    """Numbers of the samples to train on, each text once. best: the highest score, of equals the shortest."""
    passed = [i for i, verdict in enumerate(verdicts) if not verdict.failed]
    once = list({samples[i].text.strip(): i for i in reversed(passed)}.values())[::-1]
    if keep == "best" and once:
        return [min(once, key=lambda i: (-verdicts[i].score, samples[i].tokens, i))]
    return once[:1] if keep == "first" else once
