"""What a run prints at its end: what changed, samples side by side, what was written, what to run next."""

import itertools
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxft.cli import answers, assemble, heads
from jaxft.config import RunConfig
from jaxft.training import by_source
from jaxft.training.loop import Result

SHOWN = (
    "reward", "loss", "perplexity", "mean_token_accuracy", "rewards/accuracies", "rewards/margins", "divergence",
    "teacher_agreement", "exact_match", "accuracy", "margin", "brier", "calibration_error", "general_perplexity",
)  # fmt: skip
SHARES = ("exact_match", "mean_token_accuracy", "rewards/accuracies", "teacher_agreement", "accuracy")


def show(console: Console, config: RunConfig, result: Result, folder: Path, written: Path) -> None:
    """Prints the summary of a run that has ended by itself."""
    _changes(console, folder)
    _samples(console, folder)
    size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    kind = "adapter" if (written / "adapter_config.json").exists() else "model"
    console.print(f"\n{result.reason} after {result.step:,} steps. The {kind}: {written} ({size / 1e6:.2f} MB)")
    following = [f"  jaxft chat {folder}                      talk with it"] if not heads.scores(config) else []
    measured = "accuracy and calibration" if heads.scores(config) else "loss and exact match"
    following += [f"  jaxft eval {folder} data.path=<rows>     {measured} on other rows"]
    if not assemble.virtual(config):  # a prompt is part of no weight
        following += [f"  jaxft merge {folder} --out <folder>      a model for transformers or vLLM"]
    console.print("\n".join(["Next:", *following]), markup=False, soft_wrap=True)


def _changes(console: Console, folder: Path) -> None:
    """Held-out metrics of the first and last evaluation, if there are two: what the task gained, and what that cost."""
    rows = evaluations(folder)
    if not rows:
        return
    first, last = rows[0], rows[-1]
    table = Table(title="held out", title_justify="left")
    table.add_column("metric")
    for row in [first, last] if len(rows) > 1 else [last]:
        table.add_column("before" if row["step"] == 0 else f"step {row['step']}", justify="right")
    if len(rows) > 1:
        table.add_column("change", justify="right")
    told = tuple(f"/{name}" for name in SHOWN if name != "loss")
    own = [name.removeprefix("eval_") for name in last if name.startswith(f"eval_{by_source.PREFIX}")]
    for name in [*SHOWN, *(name for name in own if name.endswith(told))]:
        if f"eval_{name}" in last:
            values = [row.get(f"eval_{name}") for row in ([first, last] if len(rows) > 1 else [last])]
            changed = [change(name, *values)] if len(rows) > 1 else []
            shown = name.removeprefix(by_source.PREFIX).replace("_", " ")
            table.add_row(shown, *(number(name, value) for value in values), *changed)
    console.print(table)


def number(name: str, value: float | None) -> str:
    """A metric as it is shown."""
    if value is None:
        return ""
    return f"{value:.1%}" if name.endswith(SHARES) else f"{value:.4g}"


def change(name: str, first: float | None, last: float | None) -> str:
    """A metric's change: points of a share, part of a perplexity, else the difference."""
    if first is None or last is None:
        return ""
    if name.endswith(SHARES):
        return f"{100 * (last - first):+.1f} points"
    return f"{last / first - 1:+.1%}" if name.endswith("perplexity") else f"{last - first:+.4g}"


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold held-out metrics, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if any(name.startswith("eval_") for name in row)]


def _samples(console: Console, folder: Path) -> None:
    """The same prompts answered at the first and at the last evaluation."""
    steps = answers.read(folder / answers.FILE)
    if not steps:
        return
    first, last = min(steps), max(steps)
    table = Table(title="the same prompts", title_justify="left", show_lines=True)
    names = ["prompt", *(["before" if first == 0 else f"step {first}"] if first != last else []), f"step {last}"]
    for name in [*names, "answer of the data"]:
        table.add_column(name, overflow="fold")
    for old, new in itertools.zip_longest(steps[first], steps[last]):
        if old is None or new is None:
            continue
        cells = [new["prompt"], *([old["completion"]] if first != last else []), new["completion"], new["answer"]]
        table.add_row(*(escape(_short(cell)) for cell in cells))
    console.print(table)


def _short(text: str, limit: int = 300) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
