"""`jaxft run PIPELINE.yaml`: the stages of a pipeline one after the other (`stages`), each in a folder of its own:
run_dir/01-NAME, run_dir/02-NAME, ...

A stage is a process of its own, the same `jaxft train run_dir/01-NAME/config.yaml` that a user could type: what it
compiled and held on the device is gone when the next begins, and this process never touches a device. So whatever is
killed at whatever instant, the same command goes on: a stage that is marked complete is not run again, one that was
interrupted goes on from its checkpoint.
"""

import argparse
import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from jaxft import config as config_
from jaxft import run_dir
from jaxft.border import check
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import state
from jaxft.cli import arguments as arguments_
from jaxft.cli import child, feedback, handover, stages, summary, teach
from jaxft.cli import written as written_
from jaxft.cli.stages import Pipeline, Stage

MARK = "complete.json"
"""File in a stage's folder, written last."""
LONGER = ("train.steps", "train.epochs")
"""What may change in a run that goes on, and makes another of one that is complete."""
WAIT = 120.0
"""Seconds for which the process of a pipeline that was killed may still be saving."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the pipeline, `--from` and `--dry-run`."""
    arguments_.add_config(parser)
    parser.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and those after it again; what "
                        "they had made is kept beside it, as 02-NAME.1")  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print each stage's config, run nothing"
    )


def command(args: argparse.Namespace) -> int:
    """Runs what is left to run; the exit code of the stage that failed, or 0."""
    file, overrides = arguments_.split(args.words)
    if file is None or not stages.is_pipeline(file):
        where = "" if file is None else f"{file}: "
        raise ConfigError(f"{where}expected a pipeline, with `stages:`; of a single run: jaxft train CONFIG.yaml")
    pipeline = stages.read(file, overrides)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for stage in pipeline.stages:
        for line in stage.left:
            console.print(f"stage {stage.name} (take: {stage.take}) does not use its own {line}")
    if args.dry_run:
        print("---\n".join(f"# {told(stage)}\n{config_.dump(stage.config)}" for stage in pipeline.stages), end="")
        return 0
    begin = check_folder(pipeline, args.start)
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    several = any(stage.config.mesh.distributed for stage in pipeline.stages)
    with contextlib.nullcontext() if several else run_dir.held(pipeline.folder):
        if args.start is not None:
            put_aside(pipeline, begin, several, console)
        run_dir.keep(pipeline.folder, run_dir.PIPELINE, written(pipeline))
        for stage in pipeline.stages:
            if (stage.folder / MARK).exists():
                console.print(f"{stage.folder.name}: complete")
            elif code := _run(stage, console):
                after = "ended by a signal; what it reached is saved" if code in (130, 143) else f"failed ({code})"
                console.print(f"{stage.folder.name}: {after}. Go on: jaxft run {file} {' '.join(overrides)}".rstrip())
                return code
    show(console, pipeline)
    return 0


def told(stage: Stage) -> str:
    """A stage in a line."""
    taken = "" if stage.before is None else f", {stage.take} the model of {stage.before.name}"
    return f"{stage.folder.name} ({stage.kind}{taken})"


def written(pipeline: Pipeline) -> str:
    """What the folder of a pipeline says of its stages."""
    said = [{"name": s.name, "kind": s.kind, "take": s.take, "folder": s.folder.name} for s in pipeline.stages]
    return yaml.safe_dump({"stages": said}, sort_keys=False)


def check_folder(pipeline: Pipeline, start: str | None) -> int:
    """The number of the first stage to run. Raises ConfigError where the folder holds what does not fit the pipeline,
    before anything runs."""
    names = [stage.name for stage in pipeline.stages]
    if start is not None and start not in names:
        raise ConfigError(f"--from: got {start!r}; the stages: {', '.join(names)}")
    folder, known = pipeline.folder, {stage.folder.name for stage in pipeline.stages}
    if folder.is_dir():
        there = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"\d\d+-[A-Za-z0-9_-]+", path.name))
        if other := [name for name in there if name not in known]:
            raise ConfigError(
                f"`run_dir`: {folder} holds {other[0]}, no stage of this pipeline ({', '.join(sorted(known))}); "
                "move it away, or choose another run_dir"
            )
        if (
            any(folder.iterdir())
            and not there
            and not (folder / run_dir.PIPELINE).exists()
            and not (folder / run_dir.LOCK).exists()
        ):
            raise ConfigError(f"`run_dir`: {folder} is not empty and holds no pipeline; choose another folder")
    end = len(names) if start is None else names.index(start)
    done = [(stage.folder / MARK).exists() for stage in pipeline.stages]
    first = next((i for i, complete in enumerate(done) if not complete), len(names))
    if start is not None and first < end:
        raise ConfigError(f"--from {start}: stage {names[first]} before it is not complete; run that first")
    for i, stage in enumerate(pipeline.stages[:end]):
        if done[i] and i > first:
            raise ConfigError(
                f"{stage.folder}: stage {stage.name} is complete, and {names[first]}, which it was made after, is not; "
                f"put {names[first]} back, or run both again: --from {names[first]}"
            )
        if done[i] and (changed := differences(stage)):
            lines = "\n".join(f"  {change}" for change in changed)
            raise ConfigError(
                f"{stage.folder}: stage {stage.name} is complete, and its config is another now:\n{lines}\n"
                f"Set them back, or run it and what follows again (--from {stage.name}), or choose another run_dir."
            )
    return min(first, end)


def differences(stage: Stage) -> list[str]:
    """What of the config of a complete stage is another than it was, but for what made no difference."""
    if stage.kind != stages.TRAIN:
        return written_.differences(stage.folder, stage.config)
    before = check.plain(config_.load(stage.folder / run_dir.CONFIG))
    free = tuple(key for key in state.MAY_CHANGE if key not in LONGER)
    return state.differences(before, check.plain(stage.config), free)


def put_aside(pipeline: Pipeline, begin: int, several: bool, console: Console) -> None:
    """Gives the folders of stages that are run again another name; the last stage's first, so that no stage is ever
    complete after one that is not. Raises ConfigError."""
    there = [stage.folder for stage in pipeline.stages[begin:] if stage.folder.exists()]
    if several and there:
        raise ConfigError(f"--from: on several hosts move them away on one of them: {', '.join(map(str, there))}")
    for folder in there:
        run_dir.refuse_held(folder)
    for folder in reversed(there):
        numbers = [int(p.suffix[1:]) for p in folder.parent.glob(f"{folder.name}.*") if p.suffix[1:].isdigit()]
        kept = folder.with_name(f"{folder.name}.{1 + max(numbers, default=0)}")
        folder.rename(kept)
        console.print(f"{folder.name}: kept as {kept}")


def _run(stage: Stage, console: Console) -> int:
    """Merges what it begins from, and runs it to its end; its exit code."""
    for before in stage.merges:
        if not (before / handover.MERGED / "config.json").exists():
            console.print(f"{before.name}: merging")
            spread = ["mesh.distributed=true"] if stage.config.mesh.distributed else []
            if code := start(["merge", str(before), "--out", str(before / handover.MERGED), *spread]):
                return code
    console.rule(told(stage))
    _await(stage.folder, console)
    if stage.kind != stages.TRAIN:
        written_.refuse_other(stage.folder, stage.config)
        run_dir.keep(stage.folder, run_dir.CONFIG, config_.dump(stage.config))
    else:
        run_dir.check(stage.config)
        run_dir.write(stage.config)
    begun, verb = time.monotonic(), "teach" if stage.kind == "generate" else stage.kind
    if code := start([verb, str(stage.folder / run_dir.CONFIG)]):
        return code
    if not stage.result.exists():
        raise RuntimeError(f"{stage.folder}: the stage has ended and left no {stage.result.name}")
    about = {"stage": stage.name, "kind": stage.kind, "take": stage.take, "seconds": round(time.monotonic() - begun, 1)}
    run_dir.put(stage.folder / MARK, json.dumps(about) + "\n")
    return 0


def start(words: Sequence[str]) -> int:
    """A verb as a child process, given every SIGINT and SIGTERM that this one gets; its exit code."""
    process = subprocess.Popen(child.command([*words]), process_group=0)  # else Ctrl-C would reach it twice
    before = {}

    def pass_on(number: int, frame: object) -> None:
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, pass_on)
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _await(folder: Path, console: Console) -> None:
    """Waits for a process that still writes in a stage's folder: it ends by itself when what started it was killed."""
    ends, said = time.monotonic() + WAIT, False
    while True:
        try:
            return run_dir.refuse_held(folder)
        except ConfigError as error:
            if time.monotonic() > ends:
                raise
            if not said:
                console.print(f"waiting: {error}")
                said = True
            time.sleep(0.5)


def show(console: Console, pipeline: Pipeline) -> None:
    """What each stage changed."""
    table = Table("stage", "metric", "before", "after", "change", title="stages", title_justify="left")
    for stage in pipeline.stages:
        for number, row in enumerate(rows(stage)):
            table.add_row(stage.folder.name if number == 0 else "", *row, end_section=False)
        table.add_section()
    console.print(table)
    last = pipeline.stages[-1]
    made = f"The last of them: {last.result}"
    talk = last.kind == stages.TRAIN and not last.scores
    console.print(f"{made}\nNext: jaxft chat {last.folder}" if talk else made)


def rows(stage: Stage) -> list[tuple[str, str, str, str]]:
    """Held-out metrics of a stage before and after it; of one that writes rows, what it wrote."""
    if stage.kind == "generate":
        with (stage.folder / teach.SAMPLES).open(encoding="utf-8") as lines:
            every = [sample for line in lines for sample in json.loads(line)["samples"]]
        kept = sum(sample["kept"] for sample in every)
        passed = sum(not sample["failed"] for sample in every) / len(every)
        return [
            ("samples", "", f"{len(every):,}", ""),
            ("passed", "", f"{passed:.1%}", ""),
            ("rows", "", f"{kept:,}", ""),
        ]
    if stage.kind != stages.TRAIN:
        report = json.loads((stage.folder / feedback.REPORT).read_text(encoding="utf-8"))
        numbers = {name: value for name, value in report.items() if isinstance(value, int | float)}
        shown = {name: f"{value:,}" if isinstance(value, int) else f"{value:.3f}" for name, value in numbers.items()}
        return [(name.replace("_", " "), "", value, "") for name, value in shown.items()]
    found = summary.evaluations(stage.folder)
    if not found:
        return [("not evaluated", "", "", "")]
    first, last = found[0] if found[0]["step"] == 0 else dict[str, Any](), found[-1]
    made = []
    for name in summary.SHOWN:
        if f"eval_{name}" in last:
            a, b = first.get(f"eval_{name}"), last[f"eval_{name}"]
            made.append(
                (name.replace("_", " "), summary.number(name, a), summary.number(name, b), summary.change(name, a, b))
            )
    return made
