"""Where metrics go: `metrics.jsonl` always, TensorBoard, W&B and trackio on request.

A run that is resumed cuts its `metrics.jsonl` back to the step it resumes from, so no step is there twice.
"""

import importlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.training.config import LogConfig

FILE = "metrics.jsonl"


class Sink(NamedTuple):
    """Somewhere to write metrics."""

    write: Callable[[int, Mapping[str, float]], None]
    """``write(step, values)``"""
    close: Callable[[], None]


NONE = Sink(lambda step, values: None, lambda: None)


def open_all(config: LogConfig, folder: Path, resumed_at: int | None, settings: Mapping[str, Any]) -> Sink:
    """All sinks of a run as one.

    Args:
      folder: the run's folder.
      resumed_at: the step a resumed run goes on from, else None.
      settings: the run's config, shown by the trackers.
    """
    openers = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
    sinks = [jsonl(folder / FILE, resumed_at)]
    sinks += [openers[name](config, folder, resumed_at, settings) for name in config.to]

    def write(step: int, values: Mapping[str, float]) -> None:
        for sink in sinks:
            sink.write(step, values)

    def close() -> None:
        for sink in sinks:
            sink.close()

    return Sink(write, close)


def jsonl(path: Path, resumed_at: int | None) -> Sink:
    """One JSON object a line, each written whole; a value that is not finite is null, as JSON has no other word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut(path, -1 if resumed_at is None else resumed_at)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(step: int, values: Mapping[str, float]) -> None:
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        os.write(file, (json.dumps({"step": step, **clean}) + "\n").encode())

    return Sink(write, lambda: os.close(file))


def cut(path: Path, last_step: int) -> None:
    """Drops lines of later steps, and a last line that was cut short; the file is replaced at once or not at all."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and row["step"] <= last_step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def read(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]


def tensorboard(config: LogConfig, folder: Path, resumed_at: int | None, settings: Mapping[str, Any]) -> Sink:
    """Event files in the run's folder, under `tensorboard`; a value that is not finite is left out."""
    module = _extra("tensorboardX", "tensorboard")
    writer = module.SummaryWriter(
        str(folder / "tensorboard"), purge_step=None if resumed_at is None else resumed_at + 1
    )

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                writer.add_scalar(_grouped(name), value, step)
        writer.flush()

    return Sink(write, writer.close)


def wandb(config: LogConfig, folder: Path, resumed_at: int | None, settings: Mapping[str, Any]) -> Sink:
    """A W&B run; a resumed run goes on in the same one."""
    module = _extra("wandb", "wandb")
    note = folder / "wandb_id"
    known = note.read_text().strip() if resumed_at is not None and note.exists() else None
    run = module.init(
        project=config.project,
        name=config.name or folder.name,
        id=known,
        resume="allow" if known else None,
        dir=str(folder),
        config=dict(settings),
    )
    note.write_text(run.id)
    return Sink(lambda step, values: run.log({_grouped(n): v for n, v in values.items()}, step=step), run.finish)


def trackio(config: LogConfig, folder: Path, resumed_at: int | None, settings: Mapping[str, Any]) -> Sink:
    """A trackio run, kept on this machine."""
    module = _extra("trackio", "trackio")
    run = module.init(
        project=config.project,
        name=config.name or folder.name,
        resume="never" if resumed_at is None else "allow",
        config=dict(settings),
    )
    return Sink(lambda step, values: run.log({_grouped(n): v for n, v in values.items()}, step=step), run.finish)


def _grouped(name: str) -> str:
    """Trackers show names by the part before a slash."""
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"


def _extra(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"log.to: {name} needs the package {module}, which is not installed; pip install 'jaxft[track]', or leave "
            f"{name} out (metrics.jsonl is always written)"
        ) from None
