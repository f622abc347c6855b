"""The folder of a run: made, resumed, or refused; never overwritten.

It holds `config.yaml` (the whole resolved config), the metrics, checkpoints and samples.
"""

import contextlib
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxft import config as config_
from jaxft.border import check as border
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import state
from jaxft.config import RunConfig
from jaxft.training import loop

CONFIG = "config.yaml"
ADAPTER, WHOLE, BASE = "adapter", "model", "base"
"""Folders in it: the adapter that came out of the run, or the whole model where all of it was trained; and the base of
that adapter where the run quantised it anew."""
VALUE = "value"
"""Folder in it of the value model, adapter or whole, where it is kept (`value.save`)."""
MEMBERS = "members"
"""Folder of a sweep's members, a run's folder each but for the checkpoints, which the sweep has."""
PIPELINE = "pipeline.yaml"
"""File in the folder of a pipeline, which has a run's folder for each of its stages."""
LOCK = ".lock"


def check(config: RunConfig) -> None:
    """Raises ConfigError if `claim` or `held` would: before anything big is read."""
    _check(config)
    refuse_held(Path(str(config.run_dir)))


def refuse_held(folder: Path) -> None:
    """Raises ConfigError if a process is in a run's folder."""
    if (lock := folder / LOCK).exists():
        with lock.open() as file:
            _take(file.fileno(), folder, fcntl.LOCK_SH)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder. Raises ConfigError if one is in it.

    The lock is the system's: a process that is gone holds none. A file system that has no locks keeps nobody out."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(file, folder, fcntl.LOCK_EX)
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(file)


def _take(file: int, folder: Path, how: int) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = (folder / LOCK).read_text(encoding="utf-8").strip() or "another process"
        raise ConfigError(f"{folder}: {holder} is writing here; let it end, end it, or choose another folder") from None
    except OSError:  # no locks on this file system
        pass


def _check(config: RunConfig) -> None:
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
    _check(config)
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
    _refuse_restart(folder)
    changed = state.differences(border.plain(config_.load(folder / CONFIG)), border.plain(config))
    if changed:
        lines = "\n".join(f"  {change}" for change in changed)
        raise ConfigError(
            f"`run_dir`: the run in {folder} cannot go on with another config:\n{lines}\n"
            "Set them back, or choose another run_dir to start afresh."
        )


def _refuse_restart(folder: Path) -> None:
    """Raises ConfigError where there is nothing to go on from, and beginning anew would destroy what was reached.

    A run that was ended before its first checkpoint has reached nothing, and may begin anew."""
    if any(path.name.isdigit() for path in (folder / loop.CHECKPOINTS).glob("*")):
        return
    sweep = folder.absolute().parent.parent
    if folder.absolute().parent.name == MEMBERS and (sweep / CONFIG).is_file():
        raise ConfigError(
            f"`run_dir`: {folder} is a member of the sweep {sweep}, which keeps the checkpoints of all its members; go "
            f"on with that (jaxft train {sweep / CONFIG} --resume), or choose another run_dir to train this one alone"
        )
    made = [
        made for made in (ADAPTER, WHOLE) for run in (folder, *folder.glob(f"{MEMBERS}/*")) if (run / made).exists()
    ]
    if made:
        raise ConfigError(
            f"`run_dir`: the run in {folder} has ended ({made[0]}/), and it holds no checkpoint to go on from "
            f"({loop.CHECKPOINTS}/); choose another run_dir to start afresh"
        )


def write(config: RunConfig) -> None:
    """Writes config.yaml at once or not at all; a different earlier one is kept under a number."""
    keep(Path(str(config.run_dir)), CONFIG, config_.dump(config))


def keep(folder: Path, name: str, text: str) -> None:
    """Writes a file of a run's folder at once or not at all; a different earlier one is kept: NAME.1.yaml, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    if target.exists():
        if target.read_text(encoding="utf-8") == text:
            return
        number = 1 + len(list(folder.glob(f"{target.stem}.*{target.suffix}")))
        target.rename(folder / f"{target.stem}.{number}{target.suffix}")
    put(target, text)


def put(target: Path, text: str) -> None:
    """Writes a file at once or not at all, whoever else writes the same."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, prefix=".", delete=False) as partial:
        partial.write(text)
        partial.flush()
        os.fsync(partial.fileno())
    os.chmod(partial.name, 0o644)
    os.replace(partial.name, target)
