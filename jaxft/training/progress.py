"""What a person sees while training: a bar in a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress(NamedTuple):
    """Where progress is shown."""

    update: Callable[[int, Mapping[str, float]], None]
    """``update(step, metrics)`` after each step."""
    say: Callable[[str], None]
    """Prints a line of its own."""


@contextlib.contextmanager
def show(total: int, start: int, enabled: bool, file: TextIO | None = None) -> Iterator[Progress]:
    """Progress of a run of ``total`` steps of which ``start`` are done."""
    out = sys.stderr if file is None else file
    if not enabled:
        yield Progress(lambda step, metrics: None, lambda text: None)
    elif out.isatty():
        with _bar(total, start, out) as progress:
            yield progress
    else:
        yield _lines(total, out)


@contextlib.contextmanager
def _bar(total: int, start: int, out: TextIO) -> Iterator[Progress]:
    from rich import console, progress

    columns = [
        progress.TextColumn("[bold]train"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[facts]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    ]
    with progress.Progress(*columns, console=console.Console(file=out)) as bar:
        task = bar.add_task("train", total=total, completed=start, facts="compiling")
        yield Progress(
            lambda step, metrics: bar.update(task, completed=step, facts=facts(metrics)),
            lambda text: bar.console.print(text, markup=False, highlight=False),
        )


def _lines(total: int, out: TextIO) -> Progress:
    last = -SECONDS_BETWEEN_LINES

    def update(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal last
        if time.monotonic() - last < SECONDS_BETWEEN_LINES and step != total:
            return
        last = time.monotonic()
        left = (total - step) / metrics["steps_per_second"] if metrics.get("steps_per_second") else None
        ending = "" if left is None or step == total else f"  {duration(left)} left"
        print(f"step {step}/{total}  {facts(metrics)}{ending}", file=out, flush=True)

    return Progress(update, lambda text: print(text, file=out, flush=True))


def facts(metrics: Mapping[str, float]) -> str:
    """The few numbers worth watching, in one line; what is not known is left out."""
    parts = [f"loss {metrics['loss']:.4f}", f"lr {metrics['learning_rate']:.2e}"]
    if "reward" in metrics:
        parts.append(f"reward {metrics['reward']:.3f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in metrics:
        parts.append(f"MFU {100 * metrics['mfu']:.0f} %")
    if "memory_gb" in metrics:
        parts.append(f"{metrics['memory_gb']:.1f} GB")
    if metrics.get("skipped"):
        parts.append(f"{metrics['skipped']:.0f} skipped")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
