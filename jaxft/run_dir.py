"""The folder of a run: made, resumed, or refused; never overwritten.

It holds `config.yaml` (the whole resolved config), the metrics, checkpoints and samples.
"""

import os
from pathlib import Path

from jaxft import config as config_
from jaxft.border import check as border
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import state
from jaxft.config import RunConfig

CONFIG = "config.yaml"


def check(config: RunConfig) -> None:
    """Raises ConfigError if `claim` would: before anything big is read."""
    if config.run_dir is None:
        raise ConfigError("`run_dir` must be given: run_dir=runs/NAME")
    folder = Path(config.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`run_dir`: {folder} is a file")
    if _occupied(folder):
        _refuse_other(folder, config)


def _occupied(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def claim(config: RunConfig) -> tuple[Path, bool]:
    """The run's folder with the config written into it, and whether a run that stood there goes on. Raises ConfigError.

    A folder that has anything in it is refused unless `resume` is set and it holds a run of the same config, but for
    what may change; then the earlier config is kept as config.1.yaml, config.2.yaml, ...
    """
    check(config)
    folder = Path(str(config.run_dir))
    resumed = _occupied(folder)
    write(config)
    return folder, resumed


def _refuse_other(folder: Path, config: RunConfig) -> None:
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"`run_dir`: {folder} is not empty and holds no run; choose another folder, or empty it")
    if not config.resume:
        raise ConfigError(
            f"`run_dir`: {folder} holds a run; go on with it (--resume, or resume=true) or choose another run_dir"
        )
    changed = state.differences(border.plain(config_.load(folder / CONFIG)), border.plain(config))
    if changed:
        lines = "\n".join(f"  {change}" for change in changed)
        raise ConfigError(
            f"`run_dir`: the run in {folder} cannot go on with another config:\n{lines}\n"
            "Set them back, or choose another run_dir to start afresh."
        )


def write(config: RunConfig) -> None:
    """Writes config.yaml at once or not at all; a different earlier one is kept under a number."""
    folder, text = Path(str(config.run_dir)), config_.dump(config)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / CONFIG
    if target.exists():
        if target.read_text(encoding="utf-8") == text:
            return
        number = 1 + len(list(folder.glob("config.*.yaml")))
        target.rename(folder / f"config.{number}.yaml")
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
