"""`jaxft samples RUN`: what the policy wrote in a rollout, what each reward function said of it, and its advantage,
or its side of a pair.

The table is `rollouts.jsonl` in the run's folder, a line a completion, under the number of the first step that it is
trained on. A run that goes on from a checkpoint writes again what came after it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxft.border.errors import ConfigError
from jaxft.rewards import calling
from jaxft.training import sinks

FILE = "rollouts.jsonl"
OWN = tuple(name for name in calling.TABLE if name != "problems")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, the step, and how much to show."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--step", type=int, help="the rollout that this step was trained on; default: the last")
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="completions to show; default: 16")
    parser.add_argument("--json", action="store_true", help="print the lines as they are")


def command(args: argparse.Namespace) -> int:
    """Prints the samples of one rollout."""
    rows = read(args.run)
    steps = sorted({row["step"] for row in rows})
    if not steps:
        raise ConfigError(
            f"{args.run / FILE}: no samples of rollouts yet; an on-policy run writes them (rollout.log_samples)"
        )
    if args.step is not None and args.step < steps[0]:
        raise ConfigError(f"--step: got {args.step}; the first rollout in {args.run / FILE} is that of step {steps[0]}")
    chosen = steps[-1] if args.step is None else max(step for step in steps if step <= args.step)
    found = [row for row in rows if row["step"] == chosen][: max(args.limit, 0)]
    if args.json:
        print("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), end="")
    else:
        Console(highlight=False).print(table(found))
    return 0


def read(run: Path) -> list[dict[str, Any]]:
    """The samples of all rollouts, in order; a line that is not whole yet is left out. Raises ConfigError."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; expected that of a run")
    file = run / FILE
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Samples of one rollout as a table; a prompt stands beside the first of its completions."""
    names = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    more = list(dict.fromkeys(name for row in rows for name in row if name not in OWN))
    made = Table(
        title=f"the rollout of step {rows[0]['step']}" if rows else None, title_justify="left", show_lines=True
    )
    for name in ("prompt", "completion"):
        made.add_column(name, overflow="fold")
    totals = ["reward"] if len(names) > 1 else []
    weighed = ["advantage"] if any("advantage" in row for row in rows) else []
    for name in (*names, *totals, *weighed, "tokens"):
        made.add_column(name, justify="right")
    for name in more:
        made.add_column(name, overflow="fold")
    before = None
    for row in rows:
        prompt = "" if row["prompt"] == before else row["prompt"]
        before = row["prompt"]
        said = [number(row["rewards"].get(name)) for name in names] + [number(row["reward"])] * len(totals)
        length = f"{row['tokens']}{'' if row['finished'] else ' (cut)'}"
        advantage = [f"{row['advantage']:+.3f}"] if weighed else []
        cells = [prompt, row["completion"], *said, *advantage, length]
        made.add_row(*(escape(cell) for cell in cells), *(escape(str(row.get(name, ""))) for name in more))
    return made


def number(value: float | None) -> str:
    """A reward as it is shown."""
    return "none" if value is None else f"{value:.4g}"


class Samples:
    """The table of a run that goes on: lines of steps after the checkpoint that it goes on from are dropped."""

    def __init__(self, folder: Path):
        self.file, self.last, self.begun = folder / FILE, -1, False

    def cut(self, step: int) -> None:
        """Goes on behind the rollout of ``step``."""
        self.last = step

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The samples of the rollout that ``step`` is the first on."""
        if not self.begun:
            sinks.cut(self.file, self.last)
            self.begun = True
        with self.file.open("a", encoding="utf-8") as lines:
            for row in rows:
                lines.write(json.dumps({"step": step, **row}, ensure_ascii=False, default=plain) + "\n")


def plain(value: Any) -> Any:
    """What functions logged, as JSON: arrays and their numbers as such, what it has no word for as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
