"""`jaxft inspect ADAPTER`: what is in an adapter's folder, and what is wrong with it, without loading its model."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxft import run_dir
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import hub
from jaxft.cli import contents, target
from jaxft.cli.contents import Contents
from jaxft.peft import disk


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter and `--json`."""
    parser.add_argument("adapter", help="the folder of an adapter or of a run, or a hub id")
    parser.add_argument("--json", action="store_true", help="print JSON")


def command(args: argparse.Namespace) -> int:
    """Prints what was found; 1 if there is a problem with it."""
    found = contents.read(_directory(args.adapter))
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False))
    else:
        _show(found)
    return 1 if found.problems else 0


def _directory(name: str) -> Path:
    """The adapter's folder: as named, that in a run's, or that of a hub id. Raises ConfigError for a whole model."""
    path = hub.directory(name)
    if (path / run_dir.CONFIG).is_file():
        target.refuse_sweep(path)
    path = path / run_dir.ADAPTER if (path / run_dir.ADAPTER / disk.CONFIG).is_file() else path
    if not (path / disk.CONFIG).is_file() and ((path / run_dir.WHOLE).is_dir() or (path / "config.json").is_file()):
        raise ConfigError(f"{name}: holds a whole model and no adapter (there is no {disk.CONFIG})")
    return path


def _show(found: Contents) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row("adapter", found.path)
    facts.add_row("format", found.format)
    facts.add_row("method", found.method or "none that jaxft has")
    facts.add_row("base model", found.base_model or "not named")
    for name, value in found.settings.items():
        facts.add_row(name, _short(value))
    if found.modules_to_save:
        facts.add_row("trained whole", ", ".join(found.modules_to_save))
    if found.token_rows:
        facts.add_row("token rows", str(found.token_rows))
    facts.add_row("parameters", f"{found.parameters:,} ({found.bytes / 1e6:.2f} MB)")
    console.print(facts, "", sep="\n", soft_wrap=True)
    if found.groups:
        console.print(_table(found))
    for problem in found.problems:
        console.print(f"problem: {problem}", soft_wrap=True)


def _table(found: Contents) -> Table:
    table = Table("modules", "tensors", box=None, pad_edge=False, header_style="bold")
    for name in ("rms", "parameters", "|update|"):
        table.add_column(name, justify="right")
    for group in found.groups:
        update = "" if group.update is None else " to ".join(dict.fromkeys(f"{norm:.3g}" for norm in group.update))
        ends = list(group.tensors)
        rms = [f"{group.rms[end]:.3g}" if end in group.rms else "" for end in ends]
        tensors = "\n".join(f"{end} {group.tensors[end]}" for end in ends)
        table.add_row(group.modules, tensors, "\n".join(rms), f"{group.parameters:,}", update)
    return table


def _short(value: Any) -> str:
    """A setting in a line."""
    if isinstance(value, dict):
        value = [f"{name}: {part}" for name, part in value.items()]
    text = disk.some([str(part) for part in value], 12) if isinstance(value, list) else str(value)
    return text if len(text) <= 160 else f"{text[:160]} ..."
