"""Asks several rewards of the completions of a rollout: plain functions one after the other, async ones at once.

A function is given what it names of: ``prompts``, ``completions``, each column of the rows, ``trainer_state``,
``log_metric(name, number)``, whose mean becomes a metric, and ``log_extra(name, values)``, one value a completion for
the table of samples. One that takes ``**columns`` is given every column.

Where a function raises, it is asked again of each completion alone, so that only those that it fails on have no reward.
"""

import asyncio
import functools
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxft.rewards import function as function_
from jaxft.rewards.settings import Function, MissingColumn, Reward, Unable, Weighted

OWN_COLUMNS = ("prompt", "completion", "prompts", "completions", "trainer_state", "log_metric", "log_extra")
"""Columns of rows that a function is not given, for it has them already or they are something else."""


TABLE = ("step", "prompt", "completion", "rewards", "reward", "advantage", "tokens", "finished", "problems")
"""What the table of samples says of a completion anyway, beside what functions log."""


GREATEST = float(np.finfo(np.float32).max)
"""Of the numbers that a reward may be."""


class RewardError(ValueError):
    """A reward failed, and is told to stop the run then."""


class Asked(NamedTuple):
    """A reward function as it is asked."""

    name: str
    function: Function
    weight: float = 1.0
    on_error: Literal["none", "stop"] = "none"
    timeout: float | None = None
    """Seconds for one call of an async function."""
    place: str = ""
    """Where the function is, for messages: ``file.py:name``. Empty: its name says it."""


class Report(NamedTuple):
    """What went wrong."""

    reward: str
    """The reward's name or place."""
    sample: int | None
    """Number of the completion; None where it is all of them."""
    problem: str
    shown: str = ""
    """The completion, cut short."""

    def __str__(self) -> str:
        of = "" if self.sample is None else f", sample {self.sample}"
        return f"reward {self.reward}{of}: {self.problem}" + (f"; the completion is {self.shown}" if self.shown else "")


class Judged(NamedTuple):
    """What the rewards say of N completions."""

    values: np.ndarray
    """float32[N, F]; NaN where there is no reward."""
    reports: tuple[Report, ...] = ()
    metrics: Mapping[str, float] = {}
    """Mean of what was logged under each name."""
    extras: Mapping[str, Sequence[Any]] = {}
    """Of each name, one value a completion."""


def made(table: Mapping[str, Reward], rewards: Sequence[tuple[str, Weighted]]) -> tuple[Asked, ...]:
    """The functions of configured rewards, (name in the table, config) each, under names that are all different:
    functions of the user's own under their own. Raises ConfigError and ValueError."""
    found: list[Asked] = []
    for key, config in rewards:
        own = isinstance(config, function_.Own)
        spec, timeout = (config.function, config.timeout) if own else ("", None)
        name = spec.rpartition(":")[2] if own else key
        taken = [one.name for one in found]
        name = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 2))) if n not in taken)
        function = table[key].make(config)
        found.append(Asked(name, function, config.weight, config.on_error, timeout, spec))
    return tuple(found)


def call(
    functions: Sequence[Asked],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    trainer_state: Any = None,
) -> Judged:
    """What each function says of each completion. Raises RewardError where one fails that is told to stop, and where
    one asks for a column that the rows have not.

    Args:
      prompts: texts or lists of messages, one a completion.
      columns: what else the rows have, and ``completion_ids`` and ``finished``: of each, one value a completion.
      trainer_state: what functions that ask for it are given.
    """
    rows = {name: values for name, values in columns.items() if name not in OWN_COLUMNS}
    if wrong := [name for name, values in rows.items() if len(values) != len(completions)]:
        raise ValueError(f"column {wrong[0]}: got {len(rows[wrong[0]])} values for {len(completions)} completions")
    asks = [_Ask(one, prompts, completions, rows, trainer_state) for one in functions]
    try:
        every = _asked(asks)
    except Unable as error:
        raise RewardError(str(error)) from None
    reports = tuple(report for answer in every for report in answer.reports)
    for one, answer in zip(functions, every, strict=True):
        if one.on_error == "stop" and answer.reports:
            raise RewardError("\n".join(map(str, answer.reports[:5])))
    logged: dict[str, list[float]] = {}
    for answer in every:
        for name, value in answer.metrics:
            logged.setdefault(name, []).append(value)
    return Judged(
        np.array([answer.values for answer in every], np.float32).reshape(len(asks), len(completions)).T,
        reports,
        {name: math.fsum(values) / len(values) for name, values in logged.items()},
        {name: values for answer in every for name, values in answer.extras.items()},
    )


def _asked(asks: "Sequence[_Ask]") -> "list[_Answer]":
    """All answers; async functions work while plain ones do."""
    waiting = {i: asyncio.run_coroutine_threadsafe(ask.awaited(), _loop()) for i, ask in enumerate(asks) if ask.async_}
    answers = {i: ask.answered() for i, ask in enumerate(asks) if not ask.async_}
    answers |= {i: future.result() for i, future in waiting.items()}
    return [answers[i] for i in range(len(asks))]


class _Answer(NamedTuple):
    values: list[float]
    reports: list[Report]
    metrics: list[tuple[str, float]]
    extras: dict[str, list[Any]]


class _Ask:
    """One function and what it is asked."""

    def __init__(
        self, asked: Asked, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Any], state: Any
    ) -> None:
        self.asked, self.prompts, self.completions, self.columns = asked, prompts, completions, columns
        self.state = state
        called = getattr(asked.function, "__call__", None)  # noqa: B004  (whether its code is async, not whether it is code)
        self.async_ = inspect.iscoroutinefunction(asked.function) or inspect.iscoroutinefunction(called)
        self.metrics: list[tuple[str, float]] = []
        self.extras: dict[str, list[Any]] = {}

    def answered(self) -> _Answer:
        """Of a plain function."""
        every = [*range(len(self.completions))]
        try:
            return self.checked(self.arguments(every)(), every)
        except Unable:
            raise
        except Exception as error:
            if len(every) == 1:
                return self.failed(error, 0)
        self.metrics, self.extras = [], {}
        return self.joined([self.alone(i) for i in every])

    def alone(self, i: int) -> _Answer:
        """Of a plain function, for one completion."""
        try:
            return self.checked(self.arguments([i])(), [i])
        except Exception as error:
            return self.failed(error, i)

    async def awaited(self) -> _Answer:
        """Of an async function."""
        every = [*range(len(self.completions))]
        try:
            return self.checked(await asyncio.wait_for(self.arguments(every)(), self.asked.timeout), every)
        except TimeoutError:
            return self.failed(TimeoutError(f"no answer within {self.asked.timeout} s"), None)
        except Unable:
            raise
        except Exception as error:
            if len(every) == 1:
                return self.failed(error, 0)
        self.metrics, self.extras = [], {}
        return self.joined([*await asyncio.gather(*map(self.awaited_alone, every))])

    async def awaited_alone(self, i: int) -> _Answer:
        """Of an async function, for one completion."""
        try:
            return self.checked(await asyncio.wait_for(self.arguments([i])(), self.asked.timeout), [i])
        except Exception as error:
            return self.failed(error, i)

    def arguments(self, which: Sequence[int]) -> Callable[[], Any]:
        """The call of the function for some completions."""
        texts, asks = [self.completions[i] for i in which], [self.prompts[i] for i in which]
        given = {name: [values[i] for i in which] for name, values in self.columns.items()}

        def log_extra(name: str, values: Sequence[Any]) -> None:
            if name in TABLE:
                raise ValueError(f"log_extra({name!r}): the table of samples has {', '.join(TABLE)}; take another name")
            if len(values) != len(which):
                raise ValueError(f"log_extra({name!r}): got {len(values)} values for {len(which)} completions")
            own = self.extras.setdefault(name, [None] * len(self.completions))
            for i, value in zip(which, values, strict=True):
                own[i] = value

        asked_for = {
            "trainer_state": self.state,
            "log_metric": lambda name, value: self.metrics.append((str(name), float(value))),
            "log_extra": log_extra,
        }
        return functools.partial(_bound, self.asked.function, asks, texts, given, asked_for)

    def checked(self, found: Any, which: Sequence[int]) -> _Answer:
        """The numbers that a function gave for some completions; NaN, with a report, for what is none. An exception in
        place of a number says why there is none."""
        values = [math.nan] * len(self.completions)
        if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__len__") or not hasattr(found, "__iter__"):
            return self.failed(TypeError(f"gave {_short(found)}; expected a list of numbers or None"), _only(which))
        if len(found) != len(which):
            problem = f"gave {len(found)} values for {len(which)} completions"
            return self.failed(ValueError(problem), _only(which))
        reports = []
        for i, value in zip(which, found, strict=True):
            number = _number(value)
            if number is not None and abs(number) <= GREATEST:
                values[i] = number
            elif isinstance(value, Exception):
                reports.append(self.report(i, str(value)))
            elif value is not None:
                reports.append(self.report(i, f"gave {_short(value)}; expected a finite number or None"))
        return _Answer(values, reports, self.metrics, self.extras)

    def failed(self, error: Exception, sample: int | None) -> _Answer:
        told = str(error) if error.__traceback__ is None else function_.place(error, self.file())
        return _Answer([math.nan] * len(self.completions), [self.report(sample, told)], self.metrics, self.extras)

    def file(self) -> str | None:
        """The file that the function is in."""
        return getattr(getattr(inspect.unwrap(self.asked.function), "__code__", None), "co_filename", None)

    def report(self, sample: int | None, problem: str) -> Report:
        shown = "" if sample is None else _short(self.completions[sample])
        return Report(self.asked.place or self.asked.name, sample, problem, shown)

    def joined(self, single: Sequence[_Answer]) -> _Answer:
        """Answers about one completion each as one; a failure that is the same for all is told once."""
        values = [answer.values[i] for i, answer in enumerate(single)]
        reports = [report for answer in single for report in answer.reports]
        if len(reports) == len(single) and len({report.problem for report in reports}) == 1:
            reports = [Report(reports[0].reward, None, reports[0].problem)]
        return _Answer(values, reports, self.metrics, self.extras)


def _bound(
    function: Function, prompts: list[Any], completions: list[str], columns: Mapping[str, Any], more: Mapping[str, Any]
) -> Any:
    """The call with what the function's signature asks for. Raises MissingColumn for a parameter that nothing fills."""
    parameters = inspect.signature(function).parameters
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    all_columns = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    texts = {"prompts": prompts, "completions": completions}
    values = {**columns, **texts}
    chosen = {n: v for n, v in values.items() if n in named or all_columns} | {n: more[n] for n in more if n in named}
    if named & {*texts} or (all_columns and not named):
        filled, positional = {*chosen}, []
    else:  # f(asked, said, ...), whatever it calls them
        positional = [prompts, completions]
        chosen = {n: v for n, v in chosen.items() if n not in texts}
        filled = {*chosen, *[n for n in parameters if n not in chosen][:2]}
    lacking = [n for n, p in parameters.items() if n in named and p.default is p.empty and n not in filled]
    if lacking:
        known = ", ".join(sorted([*columns, *more]))
        name = getattr(function, "__name__", "it")
        raise MissingColumn(f"{name} asks for {lacking[0]!r}, which is no column of the rows; they have {known}")
    return function(*positional, **chosen)


def _only(which: Sequence[int]) -> int | None:
    return which[0] if len(which) == 1 else None


def _number(value: Any) -> float | None:
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) else None


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, in a thread: clients that functions keep open belong to it; a notebook has its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
