"""A reward of the user's own: a function of a Python file, plain or async.

It is `f(prompts, completions, **columns) -> [number or None, ...]`; see `calling` for what else it may ask for.
"""

import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from jaxft.border.errors import ConfigError
from jaxft.rewards.settings import Function, Weighted


@dataclass(frozen=True, kw_only=True)
class Own(Weighted):
    """A function of the user's own."""

    function: str
    """file.py:name of the function."""
    timeout: float | None = None
    """Seconds that an async function may take over a rollout; past them it has failed. A plain function has no limit,
    for nothing can stop it."""

    def __post_init__(self) -> None:
        split(self.function, "function")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout: got {self.timeout}; expected seconds above 0")


def make(config: Own) -> Function:
    """The function. Raises ConfigError."""
    return load(config.function, "rewards.function")


def split(spec: str, key: str) -> tuple[str, str]:
    """The file and the name of ``file.py:name``. Raises ConfigError; ``key``: the setting that holds it."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"`{key}`: got {spec!r}; expected file.py:name")
    return where, name


def load(spec: str, key: str) -> Function:
    """The function that ``file.py:name`` names; the file is run. Raises ConfigError; ``key``: the setting."""
    where, name = split(spec, key)
    path = Path(where).expanduser()
    if not path.is_file():
        raise ConfigError(f"`{key}`: no file {where}; expected the Python file that has {name}")
    module = "jaxft_reward_" + "".join(c if c.isalnum() else "_" for c in str(path.resolve()))
    found = importlib.util.spec_from_file_location(module, path)
    assert found is not None
    made = importlib.util.module_from_spec(found)
    sys.modules[module] = made
    try:
        # not by the loader, which takes compiled code of the same second and length for that of an edited file
        exec(compile(path.read_bytes(), str(path), "exec"), made.__dict__)
    except Exception as error:
        del sys.modules[module]
        raise ConfigError(f"`{key}`: {where} cannot be run: {place(error, str(path))}") from error
    if not callable(getattr(made, name, None)):
        raise ConfigError(f"`{key}`: {where} has no function {name!r}")
    return getattr(made, name)


def place(error: BaseException, file: str | None) -> str:
    """What an error says, and the last line of a file (of any, if it has none there) that it came through."""
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if frame[0] == file]
    return f"{own[-1][0]}, line {own[-1][1]}: {said}" if own else said
