"""`jaxft critique CONFIG`: a policy replies, a judge says what is wrong with the reply by a principle of a constitution
and revises it; what comes out are rows to train on (Bai et al. 2022, section 3, arXiv:2212.08073).

In the run's folder `judgements.jsonl` holds every question and answer as soon as it is there; `rows.jsonl`, when all
prompts are through, the prompts with the last revisions, and how they came about.
"""

import argparse
import collections
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft import run_dir
from jaxft.cli import feedback, written
from jaxft.cli.feedback import Begun, FeedbackConfig
from jaxft.data import Prompt
from jaxft.rewards.feedback import questions
from jaxft.rewards.feedback.asking import Answer, Failure
from jaxft.rewards.feedback.constitution import Principle


@dataclass(frozen=True, kw_only=True)
class CritiqueConfig(FeedbackConfig):
    """Everything that decides what `jaxft critique` writes."""

    rounds: int = 1
    """How often each reply is criticised and revised, by another principle each time."""
    finished: bool = True
    """Whether revisions that were cut at judge.max_new_tokens are left out."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: got {self.rounds}; expected at least 1")


@dataclass
class Trace:
    """How a reply became better."""

    prompt: Prompt
    principles: tuple[Principle, ...]
    text: str
    """The reply as it stands."""
    rounds: list[dict[str, str]] = field(default_factory=list)
    problem: str = ""
    """Why it is left out."""

    def heard(self, answer: Answer | Failure, what: str, ended: bool = False) -> str:
        """The text of an answer; notes what is wrong with it. ``ended``: whether it must have ended by itself."""
        if isinstance(answer, Failure):
            self.problem = f"no {what}: {answer}"
            return ""
        text = feedback.final(answer.text)
        if not text or (ended and not answer.finished):
            self.problem = f"{what} empty" if not text else f"{what} cut at judge.max_new_tokens"
        return text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and `--resume`."""
    written.arguments(parser, CritiqueConfig)


def command(args: argparse.Namespace) -> int:
    """Replies, criticises, revises, writes."""
    return written.command(args, "critique", run)


def run(config: CritiqueConfig) -> int:
    """Asks what is not answered yet and writes the rows; 1 if there is none."""
    with feedback.begin(config, 1, config.rounds) as begun:
        traces: list[Trace] = []
        for part in begun.parts():
            traces += _traces(config, begun, part)
            good = sum(not trace.problem for trace in traces)
            begun.console.print(f"{len(traces)} of {len(begun.prompts)} prompts; {good} replies revised")
        rows = [row(trace) for trace in traces if not trace.problem]
        left = collections.Counter(trace.problem for trace in traces if trace.problem)
        for problem, count in left.most_common(5):
            begun.console.print(f"left out, {count}: {problem}")
        report = {"prompts": len(traces), "rows": len(rows), "left_out": len(traces) - len(rows)}
        run_dir.put(begun.folder / feedback.REPORT, json.dumps(report) + "\n")
        if not rows:
            begun.console.print(f"No revision, so there is nothing to train on; {begun.ledger.file} has all answers.")
            return 1
        out = begun.folder / written.ROWS
        run_dir.put(out, "".join(json.dumps(made, ensure_ascii=False) + "\n" for made in rows))
        begun.console.print(f"{len(rows)} rows in {out}; every question and answer in {begun.ledger.file}")
        begun.console.print(f"Next: jaxft train CONFIG objective.name=sft data.path={out}")
    return 0


def _traces(config: CritiqueConfig, begun: Begun, prompts: Sequence[Prompt]) -> list[Trace]:
    """Of some prompts, round by round."""
    traces = [
        Trace(prompt, begun.constitution.chosen(prompt.given, config.seed, config.rounds), feedback.final(own.text))
        for prompt, [own] in zip(prompts, begun.replies(prompts), strict=True)
    ]
    for turn in range(config.rounds):
        going = [trace for trace in traces if not trace.problem]
        seeds = [feedback.number(config.seed, turn, trace.prompt.given) for trace in going]
        said = begun.ledger.ask(begun.judge, [
            questions.critique(trace.prompt.given, trace.text, trace.principles[turn], seed)
            for trace, seed in zip(going, seeds, strict=True)
        ])  # fmt: skip
        wrong = {id(trace): trace.heard(answer, "critique") for trace, answer in zip(going, said, strict=True)}
        left = [(trace, seed) for trace, seed in zip(going, seeds, strict=True) if not trace.problem]
        said = begun.ledger.ask(begun.judge, [
            questions.revise(trace.prompt.given, trace.text, wrong[id(trace)], trace.principles[turn], seed)
            for trace, seed in left
        ])  # fmt: skip
        for (trace, _), answer in zip(left, said, strict=True):
            revision = trace.heard(answer, "revision", config.finished)
            made = {"critique": wrong[id(trace)], "revision": revision}
            trace.rounds.append({"principle": trace.principles[turn].name, "before": trace.text, **made})
            trace.text = revision
    return traces


def row(trace: Trace) -> dict[str, Any]:
    """A row to train on, with what came before."""
    completion = feedback.reply(trace.prompt, trace.text)
    return {**feedback.asked(trace.prompt), "completion": completion, "rounds": trace.rounds}
