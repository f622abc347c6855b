"""`jaxft judge CONFIG`: a policy replies to each prompt several times, a judge says by the principles of a constitution
which replies are better, and the preferences become rows that `dpo` and `reward` train on (Bai et al. 2022, section 4,
arXiv:2212.08073; Lee et al. 2023, arXiv:2309.00267).

In the run's folder `judgements.jsonl` holds every question and answer as soon as it is there, in both orders;
`rows.jsonl`, when all prompts are through, the preferences with their confidence and principle.
"""

import argparse
import collections
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxft import run_dir
from jaxft.cli import feedback, written
from jaxft.cli.feedback import Begun, FeedbackConfig
from jaxft.data import Prompt
from jaxft.rewards import judge
from jaxft.rewards.feedback import verdicts
from jaxft.rewards.feedback.asking import Answer
from jaxft.rewards.feedback.constitution import Principle
from jaxft.rewards.feedback.verdicts import Comparison, Pair


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(FeedbackConfig):
    """Everything that decides what `jaxft judge` writes."""

    samples: int = 4
    """Replies to each prompt."""
    method: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: the judge is asked which of two replies is better, in both orders; pointwise: how good each is, from 1
    to 10."""
    pairs: Literal["best_worst", "all", "disjoint"] = "best_worst"
    """best_worst: all are compared, and the most preferred reply is written with the least preferred; all: every two;
    disjoint: the first with the second, the third with the fourth, and so on."""
    principles: int = 1
    """How many principles are drawn for each prompt; their verdicts are averaged."""
    confidence: float = 0.6
    """Least probability that the chosen reply is the better one."""
    unsure: Literal["drop", "keep"] = "drop"
    """What happens to preferences below that, ties among them."""
    finished: bool = True
    """Whether replies that were cut at generate.max_new_tokens are left out."""

    def __post_init__(self) -> None:
        good = {
            "samples": (self.samples >= 2, "at least 2"),
            "principles": (self.principles >= 1, "at least 1"),
            "confidence": (0.5 <= self.confidence <= 1.0, "from 0.5 to 1"),
        }
        for name, (fine, expected) in good.items():
            if not fine:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected {expected}")
        if self.generate.temperature == 0.0:
            raise ValueError("generate.temperature: got 0, which gives samples that are all the same; raise it")


class Preference(NamedTuple):
    """Two replies of which one may be better."""

    chosen: int
    rejected: int
    confidence: float
    """The probability that it is."""


class Judged(NamedTuple):
    """The replies to one prompt and what follows from them."""

    prompt: Prompt
    texts: list[str]
    principles: tuple[Principle, ...]
    preferences: list[Preference]
    comparisons: list[Comparison]
    """Those that a judge was asked for, in both orders."""
    dropped: str
    """Why there are no preferences, if there are none."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and `--resume`."""
    written.arguments(parser, JudgeConfig)


def command(args: argparse.Namespace) -> int:
    """Replies, judges, writes."""
    return written.command(args, "judge", run)


def run(config: JudgeConfig) -> int:
    """Asks what is not answered yet and writes the rows; 1 if there is none."""
    with feedback.begin(config, config.samples, config.principles, config.method == "pointwise") as begun:
        every: list[Judged] = []
        for part in begun.parts():
            every += _judged(config, begun, part)
            made = sum(len(one.preferences) for one in every)
            begun.console.print(f"{len(every)} of {len(begun.prompts)} prompts; {made} preferences")
        rows = [row for one in every for row in preference_rows(one)]
        left = collections.Counter(one.dropped for one in every if one.dropped)
        numbers = judge.told([comparison for one in every for comparison in one.comparisons])
        report = {"prompts": len(every), "rows": len(rows), "dropped": dict(left), **numbers}
        run_dir.put(begun.folder / feedback.REPORT, json.dumps(report) + "\n")
        for problem, count in left.most_common(5):
            begun.console.print(f"no preference, {count} prompts: {problem}")
        if numbers:
            begun.console.print(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in numbers.items()))
        if not rows:
            begun.console.print(f"No preference, so there is nothing to train on; {begun.ledger.file} has all answers.")
            return 1
        out = begun.folder / written.ROWS
        run_dir.put(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        begun.console.print(f"{len(rows)} preferences in {out}; every question and answer in {begun.ledger.file}")
        begun.console.print(f"Next: jaxft train CONFIG objective.name=dpo data.path={out}")
    return 0


def _judged(config: JudgeConfig, begun: Begun, prompts: Sequence[Prompt]) -> list[Judged]:
    """Of some prompts."""
    kept = [_kept(config, replies) for replies in begun.replies(prompts)]
    drawn = [begun.constitution.chosen(prompt.given, config.seed, config.principles) for prompt in prompts]
    matches = [_matches(config, len(texts)) for texts in kept]
    about = list(zip(prompts, kept, drawn, matches, strict=True))
    found = iter((_compared if config.method == "pairwise" else _rated)(begun, about))
    made = []
    for prompt, texts, principles, own in about:
        comparisons = [next(found) for _ in own]
        known = {pair: one.first for pair, one in zip(own, comparisons, strict=True) if one.first is not None}
        sure, dropped = preferences(config, known)
        if not own:
            dropped = "no two different replies" + (" that ended" if config.finished else "")
        elif not known:
            dropped = comparisons[0].problem
        made.append(Judged(prompt, texts, principles, sure, comparisons, dropped))
    return made


About = tuple[Prompt, list[str], tuple[Principle, ...], list[tuple[int, int]]]
"""A prompt, the replies, the principles, and which replies are compared."""


def _kept(config: JudgeConfig, replies: Sequence[Answer]) -> list[str]:
    """The replies that may be judged, each once."""
    texts = [one.text.strip() for one in replies if one.finished or not config.finished]
    return [*dict.fromkeys(text for text in texts if text)]


def _matches(config: JudgeConfig, count: int) -> list[tuple[int, int]]:
    """Which of so many replies are compared."""
    if config.pairs == "disjoint":
        return [(i, i + 1) for i in range(0, count - 1, 2)]
    return [*itertools.combinations(range(count), 2)]


def _compared(begun: Begun, about: Sequence[About]) -> list[Comparison]:
    """Of all pairs of all prompts."""
    pairs = [
        Pair(prompt.given, feedback.final(texts[i]), feedback.final(texts[j]), principles)
        for prompt, texts, principles, matches in about
        for i, j in matches
    ]
    return verdicts.compare(begun.ledger, begun.judge, pairs)


def _rated(begun: Begun, about: Sequence[About]) -> list[Comparison]:
    """Of all pairs, by how good each reply is."""
    asked = [
        (prompt.given, feedback.final(text), principles)
        for prompt, texts, principles, matches in about
        for text in (texts if matches else ())
    ]
    ratings = iter(verdicts.rate(begun.ledger, begun.judge, asked))
    found = []
    for _, texts, _, matches in about:
        own = [next(ratings) for _ in (texts if matches else ())]
        found += [
            Comparison(verdicts.better(own[i], own[j]), problem=own[i].problem or own[j].problem) for i, j in matches
        ]
    return found


def preferences(config: JudgeConfig, first: Mapping[tuple[int, int], float]) -> tuple[list[Preference], str]:
    """The preferences that are sure enough, and why there are none.

    ``first``: of compared replies (i, j) the probability that i is better."""
    either = {**first, **{(j, i): 1.0 - share for (i, j), share in first.items()}}
    chosen = [(i, j) if share >= 0.5 else (j, i) for (i, j), share in first.items()]
    if config.pairs == "best_worst" and first:
        won: dict[int, list[float]] = {}
        for (i, _), share in either.items():
            won.setdefault(i, []).append(share)
        order = sorted(won, key=lambda i: (-math.fsum(won[i]) / len(won[i]), i))
        chosen = [(order[0], order[-1])] if (order[0], order[-1]) in either else []
    found = [Preference(i, j, either[i, j]) for i, j in chosen]
    sure = [one for one in found if config.unsure == "keep" or one.confidence >= config.confidence]
    return sure, "" if sure else f"the judge is unsure (below confidence {config.confidence})"


def preference_rows(one: Judged) -> list[dict[str, Any]]:
    """Rows to train on."""
    return [
        {
            **feedback.asked(one.prompt),
            "chosen": feedback.reply(one.prompt, one.texts[found.chosen]),
            "rejected": feedback.reply(one.prompt, one.texts[found.rejected]),
            "confidence": found.confidence,
            "principle": ", ".join(by.name for by in one.principles),
        }
        for found in one.preferences
    ]
