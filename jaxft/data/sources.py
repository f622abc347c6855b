"""What a mixture is made of: its sources, each with the settings of its own over those that all share."""

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxft.data.config import DataConfig, SourceConfig
from jaxft.data.errors import DataError

if TYPE_CHECKING:
    from jaxft.data.examples import Reading

ITS_OWN = ("path", "subset", "limit", "columns", "eval_path", "eval_split")
"""What a source says for itself; beside sources it means nothing in `data`."""
HELD_OUT = ("eval_path", "eval_split", "eval_fraction", "eval_examples")


@dataclass(frozen=True)
class Mixture:
    """The sources of examples that lie one after the other."""

    names: tuple[str, ...]
    edges: tuple[int, ...]
    """Source `i` has the examples from `edges[i]` up to `edges[i + 1]`."""
    formats: tuple[str, ...]
    settings: tuple[DataConfig, ...]
    """Of each source alone."""
    readings: tuple["Reading", ...] = ()
    """What was met while reading each."""
    left_out: tuple[str, ...] = ()
    """Sources without a weight."""
    once: bool = False
    """Held-out data: every row comes once, whatever the weights."""


def alone(config: DataConfig, name: str) -> DataConfig:
    """The settings of one source, as if it were all there is."""
    source = config.sources[name]
    own = {each.name: getattr(source, each.name) for each in dataclasses.fields(SourceConfig) if each.name != "weight"}
    given = {key: value for key, value in own.items() if value is not None or key in ITS_OWN}
    defaults = DataConfig()
    if any(own[key] is not None for key in HELD_OUT):
        given |= {key: getattr(defaults, key) for key in HELD_OUT if own[key] is None}
    if source.task is not None:
        given["task_column"] = None
    return dataclasses.replace(config, **given, sources={}, mix=defaults.mix)


def check(config: DataConfig) -> None:
    """Refuses settings of a mixture that contradict each other. Raises DataError naming the key."""
    defaults, names = DataConfig(), ", ".join(config.sources)
    if not config.sources:
        if config.mix != defaults.mix:
            raise DataError(
                "", "data.mix", "settings of a mixture", "data.sources to mix", "Name them, or leave it out."
            )
        return
    for key in ITS_OWN:
        if getattr(config, key) != getattr(defaults, key):
            expected = f"nothing there beside data.sources ({names})"
            raise DataError("", f"data.{key}", repr(getattr(config, key)), expected, "Give it in a source.")
    for name, source in config.sources.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise DataError("", "data.sources", repr(name), "names of letters, digits, - and _", "Rename it.")
        if source.task is not None and (source.task < 0 or source.task_column is not None):
            got = f"{source.task}" + (" beside task_column" if source.task_column is not None else "")
            raise DataError("", f"data.sources.{name}.task", got, "a number from 0 on, or a column of them", "")
    rule, given = config.mix.rule, [name for name, source in config.sources.items() if source.weight is not None]
    if given and (rule != "weights" or config.mix.schedule):
        instead = "data.mix.schedule" if config.mix.schedule else f"data.mix.rule={rule}"
        expected, remedy = f"none: {instead} says the parts", f"Leave it out, or {instead}."
        raise DataError("", f"data.sources.{given[0]}.weight", str(config.sources[given[0]].weight), expected, remedy)
    if rule == "capped" and (config.mix.cap or 0) < 1:
        raise DataError("", "data.mix.cap", repr(config.mix.cap), "a size K, at least 1", "Set data.mix.cap.")
    if rule != "capped" and config.mix.cap is not None:
        raise DataError("", "data.mix.cap", str(config.mix.cap), f"none, with data.mix.rule={rule}", "Leave it out.")
    if rule == "temperature" and not config.mix.temperature > 0:
        raise DataError("", "data.mix.temperature", str(config.mix.temperature), "a number above 0", "")
    if config.mix.schedule and rule != "weights":
        raise DataError("", "data.mix.schedule", f"one, with rule={rule}", "data.mix.rule=weights", "Keep one of them.")
    mixed(config)


def weights(config: DataConfig) -> dict[int, dict[str, float]]:
    """The weights by step, given ones alone: at step 0, or as scheduled. Raises DataError for one that is none."""
    if not config.mix.schedule:
        return {0: {name: _weight(f"data.sources.{name}.weight", s.weight) for name, s in config.sources.items()}}
    for step, row in config.mix.schedule.items():
        place = f"data.mix.schedule.{step}"
        if step < 0 or set(row) != set(config.sources):
            got, expected = f"step {step} with {', '.join(row)}", f"a step from 0 on with {', '.join(config.sources)}"
            raise DataError("", place, got, expected, "Give every source a weight at every step of the schedule.")
        for name, value in row.items():
            _weight(f"{place}.{name}", value)
        if not any(row.values()):
            raise DataError("", place, "no weight above 0", "at least one", "Give a source a weight.")
    return dict(sorted(config.mix.schedule.items()))


def mixed(config: DataConfig) -> tuple[list[str], list[str]]:
    """The sources that are mixed in, and those left out since their weight is 0. Raises DataError if that is refused.

    In a schedule a source may come late, or go: it is left out only if its weight is 0 at every step."""
    rows = weights(config).values()
    useless = [name for name in config.sources if not any(row[name] for row in rows)]
    if len(useless) == len(config.sources) or (useless and config.on_error == "refuse"):
        place = "data.mix.schedule" if config.mix.schedule else f"data.sources.{useless[0]}.weight"
        got, remedy = f"0 for {', '.join(useless)}", "Leave it out, or set data.on_error=skip."
        raise DataError("", place, got, "a weight above 0", remedy)
    return [name for name in config.sources if name not in useless], useless


def _weight(place: str, value: float | None) -> float:
    value = 1.0 if value is None else value
    if not 0 <= value < float("inf"):
        raise DataError("", place, str(value), "a number from 0 on", "")
    return value
