"""What a sweep prints at its end: its members from best to worst, and a drawing of their curves."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxft import run_dir
from jaxft.cli import curves, heads, summary
from jaxft.cli.members import Member
from jaxft.config import RunConfig
from jaxft.training import evaluate, sinks
from jaxft.training.loop import Result

DRAWING = "sweep.svg"
LAST = 10  # lines of which the training loss is the mean


@dataclass(frozen=True)
class Standing:
    """Where one member ended."""

    member: Member
    loss: float
    """Training loss, the mean of its last logged steps."""
    skipped: int
    """Steps that were not finite and so not taken."""
    evaluation: dict[str, float]
    """Its last evaluation; empty if there was none."""
    failed: bool
    """Whether its loss is not finite at the end: what is kept of it are its last steps that were."""


def standings(config: RunConfig, runs: Sequence[Member]) -> list[Standing]:
    """The members, best first: by ``eval.metric``, or training loss where nothing was evaluated; failed ones last."""
    found = [_standing(config, member) for member in runs]
    if all(standing.evaluation for standing in found):
        return sorted(found, key=lambda standing: (standing.failed, evaluate.cost(config.eval, standing.evaluation)))
    return sorted(found, key=lambda s: (s.failed, s.loss if math.isfinite(s.loss) else math.inf))


def _standing(config: RunConfig, member: Member) -> Standing:
    rows = sinks.read(member.folder)
    steps = [row for row in rows if "loss" in row]
    last = next((row for row in reversed(rows) if any(name.startswith("eval_") for name in row)), {})
    evaluation = {name[5:]: _number(value) for name, value in last.items() if name.startswith("eval_")}
    losses = [_number(row["loss"]) for row in steps[-LAST:]]
    failed = not math.isfinite((losses or [0.0])[-1]) or not math.isfinite(evaluation.get(config.eval.metric, 0.0))
    skipped = int(steps[-1]["skipped"]) if steps else 0
    return Standing(member, sum(losses) / max(len(losses), 1), skipped, evaluation, failed)


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # what was not finite


def show(console: Console, config: RunConfig, runs: Sequence[Member], result: Result, folder: Path) -> int:
    """Prints the ranking and what to do with it; draws the curves; 1 if a member failed."""
    ranked = standings(config, runs)
    shown = [name for name in dict.fromkeys((config.eval.metric, *summary.SHOWN)) if name in ranked[0].evaluation]
    by = f"held-out {shown[0]}" if shown else "training loss"
    table = Table(title=f"members, best first by {by.replace('_', ' ')}", title_justify="left")
    skips = any(standing.skipped for standing in ranked)
    metrics = [name.removeprefix("mean_").replace("_", " ") for name in shown]
    for name in ("", *ranked[0].member.values, *metrics, "training loss", *(["steps skipped"] if skips else [])):
        table.add_column(name, justify="right")
    for place, standing in enumerate(ranked, 1):
        numbers = [summary.number(name, standing.evaluation[name]) for name in shown]
        skipped = [str(standing.skipped)] if skips else []
        table.add_row(
            "failed" if standing.failed else str(place),
            *standing.member.values.values(),
            *numbers,
            f"{standing.loss:.4g}",
            *skipped,
        )
    console.print(table)
    drawing = folder / DRAWING
    drawing.write_text(curves.svg({m.name: sinks.read(m.folder) for m in runs}, config.eval.metric), encoding="utf-8")
    lost = [standing.member.name for standing in ranked if standing.failed]
    console.print(
        f"\n{result.reason} after {result.step:,} steps. Each member is a run: {folder / run_dir.MEMBERS}/<name>. "
        f"Curves: {drawing}",
        *(
            [f"Failed, their loss not finite at the end: {' and '.join(lost)}. Try a lower learning rate."]
            if lost
            else []
        ),
        sep="\n",
        markup=False,
        soft_wrap=True,
    )
    if len(lost) == len(ranked):
        return 1
    best = shlex.quote(str(ranked[0].member.folder))
    talk = "" if heads.scores(config) else f"  jaxft chat {best}    talk with the best\n"
    console.print(
        f"Next:\n{talk}  jaxft eval {best} data.path=<rows>\n  jaxft merge {best} --out <folder>",
        markup=False,
        soft_wrap=True,
    )
    return 1 if lost else 0
