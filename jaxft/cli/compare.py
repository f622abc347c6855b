"""`jaxft compare CONFIG`: many methods on one task at one size: accuracy, parameters, memory, time.

Every run is a `jaxft train` of its own with the method, size and seed set, in a folder of its own; a run that is there
already is not repeated, so a comparison that was interrupted goes on. The plain prompt and the prompt after a few
examples are scored beside them.
"""

import argparse
import difflib
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from jaxft import config as config_
from jaxft import model as model_
from jaxft import peft, run_dir
from jaxft.border import check
from jaxft.border.errors import ConfigError
from jaxft.cli import arguments as arguments_
from jaxft.cli import child, summary
from jaxft.config import RunConfig
from jaxft.peft import budget, registry


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
    budget: int | None

    @property
    def config(self) -> Path:
        """The file that every run starts from."""
        return self.out / "config.yaml"

    @property
    def asked(self) -> Path:
        """The file of what was asked for on the command line and makes a run what it is."""
        return self.out / "asked.json"

    def claims(self, config: RunConfig) -> dict[Path, str]:
        """Files that tell a comparison from another, with what is in them."""
        asked = {"limit": self.limit, "budget": self.budget}
        return {self.config: config_.dump(config), self.asked: json.dumps(asked)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config, the methods, seeds, size, and how to run."""
    arguments_.add_config(parser)
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help="names of methods, and file.py:Class of your own; default: all that need no setting",
    )
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
    named, plan = _methods(args.methods), _plan(args)
    _refuse_without_held_out(config)
    _refuse_other(plan, config)
    console = Console(highlight=False)
    entries = [Entry("prompt"), *([Entry(f"{args.shots}-shot prompt", shots=args.shots)] if args.shots else [])]
    entries += methods(config, named, args.budget)
    plan.out.mkdir(parents=True, exist_ok=True)
    with run_dir.held(plan.out):
        for path, text in plan.claims(config).items():
            path.write_text(text, encoding="utf-8")
        with ThreadPoolExecutor(args.jobs) as pool:
            for entry in pool.map(lambda entry: _runs(plan, entry), entries):
                console.print(" | ".join(cells(entry)), markup=False)
        rows = sorted(entries, key=lambda e: -_mean(e, "exact_match"))
        console.print(table(rows))
        (args.out / "table.md").write_text(markdown(rows), encoding="utf-8")
        (args.out / "results.json").write_text(json.dumps([vars(e) for e in rows], indent=1), encoding="utf-8")
    console.print(f"{args.out}/table.md, {args.out}/results.json", markup=False)
    return 1 if any(entry.problem for entry in entries) else 0


def _plan(args: argparse.Namespace) -> Plan:
    """What the flags say of all runs. Raises ConfigError naming the flag that makes no sense."""
    for flag, value, least in (("--budget", args.budget, 1), ("--jobs", args.jobs, 1)):
        arguments_.refuse_below(flag, value, least)
    for flag, value in (("--limit", args.limit), ("--shots", args.shots)):
        arguments_.refuse_below(flag, value, 0)
    seeds = arguments_.numbers("--seeds", args.seeds, int)
    factors = arguments_.numbers("--lr-factors", args.lr_factors, float)
    arguments_.refuse_twice("--seeds", seeds)
    arguments_.refuse_twice("--lr-factors", factors)
    if not all(0 < factor < math.inf for factor in factors):
        raise ConfigError(f"--lr-factors: got {args.lr_factors}; expected positive numbers such as 0.3,1,3")
    return Plan(args.out, tuple(seeds), tuple(factors), args.limit, args.budget)


def _refuse_without_held_out(config: RunConfig) -> None:
    if not config.data.holds_out:
        raise ConfigError(
            "`data.eval_path`: methods are compared on held-out rows, and the config has none; give "
            "data.eval_path=FILE (or data.eval_split, data.eval_fraction, data.eval_examples)"
        )


def _refuse_other(plan: Plan, config: RunConfig) -> None:
    """Raises ConfigError if the folder holds runs of other settings, which would stand in the same table."""
    if not plan.config.exists():
        return
    for path, text in plan.claims(config).items():
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found != text:
            what = f": {found or 'nothing'}, now {text}" if path == plan.asked else ""
            raise ConfigError(f"{path}: holds a comparison with other settings{what}; choose another --out")


ASKING = ("adapter", "trainable_tokens")
"""Methods that cannot be compared until a setting says on what: an earlier adapter, which tokens."""


def _methods(text: str | None) -> dict[str, type]:
    """The configs of the methods to compare, by name; one of the user's own is a file.py:Class, or what an installed
    package offers. Raises ConfigError."""
    known = registry.installed() | {name: method.config for name, method in peft.METHODS.items()}
    if text is None:
        return {name: cls for name, cls in known.items() if name in peft.METHODS and name not in ASKING}
    found: dict[str, type] = {}
    for name in text.split(","):
        if name not in known and ":" not in name:
            meant = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, known, 1))
            raise ConfigError(f"--methods: got {name!r}; expected file.py:Class, or some of {', '.join(known)}{meant}")
        try:
            spec, cls = (name, known[name]) if name in known else registry.find(name)
        except ValueError as error:
            raise ConfigError(f"--methods: {str(error).removeprefix('peft.module: ')}") from None
        if spec in found:
            raise ConfigError(f"--methods: got {name} more than once; expected each once")
        found[spec] = cls
    return found


def methods(config: RunConfig, named: Mapping[str, type], wanted: int | None) -> list[Entry]:
    """An entry for each method, its size set to the budget; settings of the config's own method are kept.

    The config's learning rate is that of its own method; the others' are in proportion to their defaults."""
    base = model_.load(config.model.path, config.model.dtype, revision=config.model.revision)
    own = {choice.name: choice.value for choice in config.peft}
    first = peft.method_of(config.peft[0].value).lr
    scale = 1.0 if config.optim.lr is None else config.optim.lr / first
    if wanted is None:
        wanted = budget.count(base, peft.LoRA(rank=8))
    entries = []
    for spec, cls in named.items():
        module = ":" in spec
        name = spec.rpartition(":")[2] if module else spec
        if any(entry.name == name for entry in entries):
            raise ConfigError(f"--methods: got two of the name {name}; give one of the classes another name")
        try:
            start = own[spec] if spec in own else cls()
            settings, parameters = budget.fit(base, spec, start, wanted)
        except (ValueError, TypeError) as error:
            entries.append(Entry(name, {}, problem=str(error)))
            continue
        lr = scale * peft.method_of(settings).lr
        section = {check.MODULE if module else "method": spec, **check.plain(settings)}
        entries.append(Entry(name, section, parameters, lr))
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
    folder = plan.out / entry.name.replace(" ", "_") / f"seed{seed}-lr{lr:.6g}"
    kept, log = folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.log")
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as said:
        command = _command(plan, entry, seed, lr, folder)
        process = subprocess.run(child.command(command), stdout=subprocess.PIPE, stderr=said, text=True, check=False)
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
GENERAL = "general perplexity"


def columns(entries: Sequence[Entry]) -> tuple[str, ...]:
    """The table's columns; with `eval.general` one more."""
    return (*COLUMNS, GENERAL) if any("general_perplexity" in run for e in entries for run in e.runs) else COLUMNS


def cells(entry: Entry, columns: Sequence[str] = COLUMNS) -> list[str]:
    """One line of the table as text: means over the seeds, accuracy with its standard deviation."""
    scores = [run["exact_match"] for run in entry.runs if "exact_match" in run]
    spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    score = f"{100 * statistics.fmean(scores):.1f}{spread} %" if scores else entry.problem or "-"

    def number(name: str, form: str) -> str:
        value = _mean(entry, name)
        return format(value, form) if value > float("-inf") else "-"

    size = f"{entry.parameters:,}" if entry.settings else "0"
    rate = f"{entry.lr:.2g}" if entry.settings else "-"
    made = [entry.name, score, number("loss", ".3f"), size, rate, number("step_ms", ".1f"), number("memory_gb", ".2f")]
    return [*made, number("general_perplexity", ".3f")] if GENERAL in columns else made


def table(entries: Sequence[Entry]) -> Table:
    """The table for a terminal."""
    names = columns(entries)
    shown = Table(*names)
    for entry in entries:
        shown.add_row(*cells(entry, names))
    return shown


def markdown(entries: Sequence[Entry]) -> str:
    """The table for a README."""
    names = columns(entries)
    lines = [names, ["---"] * len(names), *(cells(entry, names) for entry in entries)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
