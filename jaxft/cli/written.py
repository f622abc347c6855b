"""What verbs share that write rows to train on (`teach`, `critique`, `judge`): a config of their own, and a folder that
is begun, gone on with, or refused."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxft import config as config_
from jaxft import run_dir
from jaxft.border import check, reading
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import state
from jaxft.cli import arguments as arguments_
from jaxft.config import RunConfig

T = TypeVar("T")
ROWS = "rows.jsonl"
"""File of the rows, written at once when the verb has ended."""
MAY_CHANGE = ("run_dir", "resume", "mesh")


def arguments(parser: argparse.ArgumentParser, root: type) -> None:
    """Adds the config, `--resume` and `--dry-run`."""
    arguments_.add_config(parser)
    parser.set_defaults(root=root)
    parser.add_argument("--resume", action="store_true", help="go on with what is in run_dir (resume=true)")
    parser.add_argument("--dry-run", action="store_true", help="check the config, print all of it, and do nothing else")


def command(args: argparse.Namespace, name: str, run: Callable[[Any], int]) -> int:
    """Reads the config (run_dir: runs/ with the file's name, or the verb's) and runs the verb with it."""
    file, overrides = arguments_.split(args.words)
    config = load(args.root, file, [*overrides, *(["resume=true"] if args.resume else [])])
    if config.run_dir is None:
        config = dataclasses.replace(config, run_dir=f"runs/{file.stem if file else name}")
    if args.dry_run:
        print(config_.dump(config), end="")
        return 0
    return run(config)


def load(cls: type[T], file: Path | None, overrides: Sequence[str] = ()) -> T:
    """The config of a file and overrides. Raises ConfigError."""
    return check.build(cls, reading.read(file, overrides))


def model(section: Any) -> RunConfig:
    """A model that a section names (path, revision, dtype, quantize) as other verbs know one."""
    about = {"path": section.path, "revision": section.revision, "dtype": section.dtype}
    return check.build(RunConfig, reading.Source({"model": about, "quant": {"method": section.quantize}}))


def refuse_other(folder: Path, config: Any) -> None:
    """Raises ConfigError for a folder that holds something else than this run, begun."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / run_dir.CONFIG).is_file():
        raise ConfigError(f"`run_dir`: {folder} is not empty and holds no run; choose another folder, or empty it")
    if not config.resume:
        raise ConfigError(f"`run_dir`: {folder} holds a run; go on with it (--resume) or choose another run_dir")
    if changed := differences(folder, config):
        raise ConfigError("\n".join([f"`run_dir`: the run in {folder} cannot go on with another config:", *changed]))


def differences(folder: Path, config: Any) -> list[str]:
    """What of the config in a folder differs, but for what may."""
    before = load(type(config), folder / run_dir.CONFIG)
    return state.differences(check.plain(before), check.plain(config), MAY_CHANGE)
