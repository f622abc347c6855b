"""`jaxft compare CONFIG`: many methods on one task at one size: accuracy, parameters, memory, time.

Every run is a `jaxft train` of its own with the method, size and seed set, in a folder of its own; a run that is there
already is not repeated, so a comparison that was interrupted goes on. The plain prompt and the prompt after a few
examples are scored beside them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from jaxft import config as config_
from jaxft import model as model_
from jaxft import peft
from jaxft.border import check
from jaxft.border.errors import ConfigError
from jaxft.cli import arguments as arguments_
from jaxft.cli import summary
from jaxft.config import RunConfig
from jaxft.peft import budget


@dataclass
class Entry:
    """One line of the table: a method, or a prompt without training."""

    name: str
    settings: dict[str, Any] | None = None
    """The `peft` section; None for a prompt."""
    parameters: int = 0
    lr: float = 0.0
    shots: int = 0
    runs: list[dict[str, float]] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    out: Path
    seeds: tuple[int, ...]
    lr_factors: tuple[float, ...]
    limit: int

    @property
    def config(self) -> Path:
        """The file that every run starts from."""
        return self.out / "config.yaml"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config, the methods, seeds, size, and how to run."""
    arguments_.add_config(parser)
    parser.add_argument("--methods", metavar="A,B", help="names of methods; default: all that need no setting")
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="train.seed of each run; default: 0,1,2")
    parser.add_argument(
        "--budget", type=int, metavar="N", help="trained parameters to match where a method can; default: rank-8 LoRA's"
    )
    parser.add_argument("--shots", type=int, default=4, metavar="K", help="examples in the few-shot prompt; default: 4")
    parser.add_argument(
        "--lr-factors",
        default="1",
        metavar="0.3,1,3",
        help="learning rates to try with the first seed, relative to each method's; the lowest held-out loss is kept",
    )
    parser.add_argument("--limit", type=int, default=240, metavar="N", help="held-out prompts to answer; default: 240")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="runs at a time; times then mean little")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder; default: runs/compare")


def command(args: argparse.Namespace) -> int:
    """Trains what is not there yet and prints the table; 1 if a run failed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the device
    file, overrides = arguments_.split(args.words)
    config = config_.load(file, overrides)
    console = Console(highlight=False)
    entries = [Entry("prompt"), Entry(f"{args.shots}-shot prompt", shots=args.shots)]
    entries += methods(config, _names(args.methods), args.budget)
    plan = Plan(
        args.out,
        tuple(int(seed) for seed in args.seeds.split(",")),
        tuple(float(factor) for factor in args.lr_factors.split(",")),
        args.limit,
    )
    _claim(plan, config)
    with ThreadPoolExecutor(args.jobs) as pool:
        for entry in pool.map(lambda entry: _runs(plan, entry), entries):
            console.print(" | ".join(cells(entry)), markup=False)
    rows = sorted(entries, key=lambda e: -_mean(e, "exact_match"))
    console.print(table(rows))
    (args.out / "table.md").write_text(markdown(rows), encoding="utf-8")
    (args.out / "results.json").write_text(json.dumps([vars(e) for e in rows], indent=1), encoding="utf-8")
    console.print(f"{args.out}/table.md, {args.out}/results.json", markup=False)
    return 1 if any(entry.problem for entry in entries) else 0


def _claim(plan: Plan, config: RunConfig) -> None:
    """Writes the config that all runs begin with. Raises ConfigError if the folder holds runs of another one."""
    plan.out.mkdir(parents=True, exist_ok=True)
    text = config_.dump(config)
    if plan.config.exists() and plan.config.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{plan.config}: holds a comparison with other settings; choose another --out")
    plan.config.write_text(text, encoding="utf-8")


ASKING = ("adapter", "trainable_tokens")
"""Methods that cannot be compared until a setting says on what: an earlier adapter, which tokens."""


def _names(text: str | None) -> list[str]:
    names = [name for name in peft.METHODS if name not in ASKING] if text is None else text.split(",")
    unknown = [name for name in names if name not in peft.METHODS]
    if unknown:
        raise ConfigError(f"--methods: got {', '.join(unknown)}; expected some of {', '.join(peft.METHODS)}")
    return names


def methods(config: RunConfig, names: Sequence[str], wanted: int | None) -> list[Entry]:
    """An entry for each method, its size set to the budget; settings of the config's own method are kept.

    The config's learning rate is that of its own method; the others' are in proportion to their defaults."""
    base = model_.load(config.model.path, config.model.dtype, revision=config.model.revision)
    own = {choice.name: choice.value for choice in config.peft}
    first = peft.method_of(config.peft[0].value).lr
    scale = 1.0 if config.optim.lr is None else config.optim.lr / first
    if wanted is None:
        wanted = budget.count(base, peft.LoRA(rank=8))
    entries = []
    for name in names:
        start = own.get(name, peft.METHODS[name].config())
        try:
            settings, parameters = budget.fit(base, name, start, wanted)
        except ValueError as error:
            entries.append(Entry(name, {}, problem=str(error)))
            continue
        lr = scale * peft.METHODS[name].lr
        entries.append(Entry(name, {"method": name, **check.plain(settings)}, parameters, lr))
    return entries


def _runs(plan: Plan, entry: Entry) -> Entry:
    """The entry with its runs: one for each learning rate with the first seed, then the other seeds with the best."""
    if entry.problem:
        return entry
    if entry.settings is None:
        return _done(entry, [_run(plan, entry, plan.seeds[0], 0.0)])
    tried = [_run(plan, entry, plan.seeds[0], entry.lr * factor) for factor in plan.lr_factors]
    losses = [run["loss"] if isinstance(run, dict) else float("inf") for run in tried]
    best = losses.index(min(losses))
    entry.lr *= plan.lr_factors[best]
    return _done(entry, [tried[best], *(_run(plan, entry, seed, entry.lr) for seed in plan.seeds[1:])])


def _done(entry: Entry, runs: list[dict[str, float] | str]) -> Entry:
    entry.runs = [run for run in runs if isinstance(run, dict)]
    entry.problem = next((run for run in runs if isinstance(run, str)), "")
    return entry


def _run(plan: Plan, entry: Entry, seed: int, lr: float) -> dict[str, float] | str:
    """What one run reached, or what went wrong; kept in a file, so that it is run once."""
    folder = plan.out / entry.name.replace(" ", "_") / f"seed{seed}-lr{lr:.2g}"
    kept, log = folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.log")
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as said:
        command = [sys.executable, "-m", "jaxft", *_command(plan, entry, seed, lr, folder)]
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, text=True, check=False)
        said.write(process.stdout)
    if process.returncode:
        return f"exit code {process.returncode}, see {log}"
    found = _measured(folder) if entry.settings else _printed(process.stdout)
    found["seconds"] = time.monotonic() - begun
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def _command(plan: Plan, entry: Entry, seed: int, lr: float, folder: Path) -> list[str]:
    limit = str(plan.limit)
    if entry.settings is None:
        return ["eval", str(plan.config), "--json", "--limit", limit, "--shots", str(entry.shots)]
    section = yaml.safe_dump(entry.settings, default_flow_style=True, width=10**6).strip()
    own = [f"peft={section}", f"optim.lr={lr}", f"train.seed={seed}", f"run_dir={folder}", "resume=true"]
    return ["train", str(plan.config), *own, f"eval.exact_match={limit}", "log.progress=false", "eval.at_start=false"]


def _printed(text: str) -> dict[str, float]:
    values = json.loads(text.strip().splitlines()[-1])
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _measured(folder: Path) -> dict[str, float]:
    """The last evaluation of a run, its memory, and its median time for a step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = summary.evaluations(folder)[-1]
    found = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    rates = [line["steps_per_second"] for line in lines if "steps_per_second" in line]
    if rates:
        found["step_ms"] = 1000.0 / statistics.median(rates)
    peaks = [line["memory_gb"] for line in lines if "memory_gb" in line]
    return {**found, "memory_gb": max(peaks)} if peaks else found


def _mean(entry: Entry, name: str) -> float:
    values = [run[name] for run in entry.runs if name in run]
    return statistics.fmean(values) if values else float("-inf")


COLUMNS = ("method", "exact match", "held-out loss", "parameters", "learning rate", "ms a step", "peak GB")


def cells(entry: Entry) -> list[str]:
    """One line of the table as text: means over the seeds, accuracy with its standard deviation."""
    scores = [run["exact_match"] for run in entry.runs if "exact_match" in run]
    spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    score = f"{100 * statistics.fmean(scores):.1f}{spread} %" if scores else entry.problem or "-"

    def number(name: str, form: str) -> str:
        value = _mean(entry, name)
        return format(value, form) if value > float("-inf") else "-"

    size = f"{entry.parameters:,}" if entry.settings else "0"
    rate = f"{entry.lr:.2g}" if entry.settings else "-"
    return [entry.name, score, number("loss", ".3f"), size, rate, number("step_ms", ".1f"), number("memory_gb", ".2f")]


def table(entries: Sequence[Entry]) -> Table:
    """The table for a terminal."""
    shown = Table(*COLUMNS)
    for entry in entries:
        shown.add_row(*cells(entry))
    return shown


def markdown(entries: Sequence[Entry]) -> str:
    """The table for a README."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(entry) for entry in entries)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
