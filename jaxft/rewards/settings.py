"""What the configs of rewards share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxft.rewards import answers

Function = Callable[..., Any]
"""``f(prompts, completions, **columns) -> [number or None, ...]``, or such an ``async def``."""


class Reward(NamedTuple):
    """An entry of the table."""

    config: type
    make: Callable[[Any], Function]
    """The function that a config describes."""


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """What any reward may be told."""

    weight: float = 1.0
    """Factor of this reward in the sum of all. 0: it is only watched, beside those that are learnt."""
    on_error: Literal["none", "stop"] = "none"
    """What happens to a sample that the reward fails on (it raises, or gives NaN): none: it is reported and has no
    reward of this kind; stop: the run ends."""


@dataclass(frozen=True, kw_only=True)
class Final:
    """What is judged of a completion."""

    tags: tuple[str, str] = answers.TAGS
    """What stands around the reasoning, which is not judged. Where it never ends there is no answer."""

    def __post_init__(self) -> None:
        check_tags(self.tags)


def check_tags(tags: tuple[str, str]) -> None:
    """Raises ValueError for tags that are not there."""
    if not all(tags):
        raise ValueError(f"tags: got {list(tags)}; expected two texts such as <think> and </think>")


class Unable(ValueError):
    """What a reward cannot work with: the run's fault, not a completion's."""


class MissingColumn(Unable):
    """A reward asks for a column that the rows have not."""


def column(columns: Mapping[str, Sequence[Any]], name: str, key: str) -> Sequence[Any]:
    """A column of the rows. Raises MissingColumn; ``key``: the setting that names it."""
    if name not in columns:
        known = ", ".join(sorted(columns)) or "none"
        raise MissingColumn(f"{key}: the rows have no column {name!r}; they have {known}")
    return columns[name]
