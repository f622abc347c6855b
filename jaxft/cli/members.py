"""The members of a sweep: what `--sweep peft.rank=8,16 optim.lr=1e-4,3e-4 seed=0..3` says, as one config a member.

Members are all combinations of the values. Only what leaves the compiled program as it is can differ between them: the
peak learning rate, seeds, and numbers of the method that end up in its arrays.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from jaxft import config as config_
from jaxft import run_dir
from jaxft.border import reading
from jaxft.border.errors import ConfigError
from jaxft.config import RunConfig

ALIASES = {"seed": "train.seed"}
FREE = ("optim.lr", "train.seed", "data.seed")
METHOD = re.compile(r"peft(\.\d+)?\.(\w+)")
# fields of methods that decide what there is to train, or are part of the program
FIXED = (
    "method",
    "targets",
    "exclude",
    "layers",
    "modules_to_save",
    "bias",
    "ensure_weight_tying",
    "dropout",
    "select",
)
CAN = (
    f"a sweep can vary {', '.join(FREE)} (seed is train.seed), and the numbers of the method, such as peft.rank and "
    "peft.alpha; for the rest make a run each"
)


@dataclass(frozen=True)
class Member:
    """One of the runs that a sweep is."""

    name: str
    """What it differs in: ``rank=8,lr=0.0001,seed=0``. Also its folder's name."""
    values: dict[str, str]
    """The same as a table: ``{"rank": "8", ...}``."""
    config: RunConfig
    """The config of this run alone."""

    @property
    def folder(self) -> Path:
        return Path(str(self.config.run_dir))


def expand(config: RunConfig) -> list[Member]:
    """The members of ``config.sweep``, the last key varying fastest. Raises ConfigError."""
    axes = [_axis(item) for item in config.sweep]
    keys = [key for axis, _ in axes for key in axis]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"`sweep`: {key} is there more than once; give all its values at once")
    tails = [key.rpartition(".")[2] for key in keys]
    short = {key: tail if tails.count(tail) == 1 else key for key, tail in zip(keys, tails, strict=True)}
    made = []
    for choice in itertools.product(*(values for _, values in axes)):
        chosen = {key: text for (axis, _), text in zip(axes, choice, strict=True) for key in axis}
        values = {short[key]: text for key, text in chosen.items()}
        name = re.sub(r"[^\w.=,+-]", "_", ",".join(f"{key}={text}" for key, text in values.items()))
        if any(member.name == name for member in made):
            raise ConfigError(f"`sweep`: two members are {name}; give each value once")
        folder = str(Path(str(config.run_dir)) / run_dir.MEMBERS / name)
        alone = dataclasses.replace(config, sweep=(), resume=False, run_dir=folder)
        made.append(Member(name, values, config_.changed(alone, [f"{key}={text}" for key, text in chosen.items()])))
    if config.model.init == "random" and len({member.config.train.seed for member in made}) > 1:
        raise ConfigError(
            "`sweep`: train.seed draws the weights of model.init=random, which members share; leave it out"
        )
    return made


def _axis(item: str) -> tuple[list[str], list[str]]:
    """The keys and values of one item: ``seed,data.seed=0..3`` is two keys that go together, with four values."""
    left, equals, right = item.partition("=")
    keys = [ALIASES.get(key.strip(), key.strip()) for key in left.split(",")]
    if not equals or not all(keys):
        raise ConfigError(
            f"`sweep`: expected key=value,value,... (such as optim.lr=1e-4,3e-4 or seed=0..3), got {item!r}"
        )
    for key in keys:
        method = METHOD.fullmatch(key)
        if key not in FREE and (method is None or method[2] in FIXED):
            raise ConfigError(f"`sweep`: {key} cannot differ between members; {CAN}")
    values = [value for part in right.split(",") for value in _values(item, part.strip())]
    return keys, values


def _values(item: str, part: str) -> list[str]:
    """One value, or all integers of ``first..last``."""
    span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
    if span and int(span[1]) <= int(span[2]):
        return [str(number) for number in range(int(span[1]), int(span[2]) + 1)]
    if span or not part:
        raise ConfigError(f"`sweep`: {item!r} has {part or 'an empty value'!r}; expected values, or first..last")
    value = reading.read_yaml(f"_: {part}", "--sweep").values["_"]
    return ["null" if value is None else str(value)]
