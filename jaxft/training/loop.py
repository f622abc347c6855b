"""The host loop around the jitted step: data in, metrics out, evaluation, checkpoints, and every way a run can end.

Unusual: nothing in the loop waits for the step it has just dispatched. The metrics of a step are fetched while the next
one runs; only evaluation, a checkpoint and the end wait. A run that is killed at any instant and started again goes on
from its last complete checkpoint and is, on a CPU or TPU, bit for bit the run that was never killed.
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxft.checkpoint import state as disk
from jaxft.checkpoint.config import CheckpointConfig
from jaxft.checkpoint.state import Record
from jaxft.core import tree
from jaxft.training import by_source, evaluate, finite, interrupt, metrics, prefetch, progress, sinks
from jaxft.training.config import EvalConfig, LogConfig, TrainConfig
from jaxft.training.evaluate import Best, Evaluator
from jaxft.training.finite import NonFiniteError
from jaxft.training.prefetch import Item, Loader, Place, Read, Source
from jaxft.training.state import TrainState, steps_taken

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Settings:
    """The sections of the config that the loop reads."""

    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


class Result(NamedTuple):
    """How a run ended."""

    state: TrainState
    step: int
    reason: str
    """complete, early_stop, end_of_data, SIGINT or SIGTERM."""
    exit_code: int
    """0, or 130 (SIGINT) and 143 (SIGTERM)."""
    evaluation: dict[str, float]
    """The last evaluation; empty if there was none."""
    best: Best


@dataclass
class _Counts:
    """What the loop remembers besides the state; saved with it."""

    num_tokens: int = 0
    skipped: int = 0
    streak: int = 0
    best: Best = field(default_factory=Best)
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluated_at: int | None = None
    sources: dict[str, int] = field(default_factory=dict)
    """Tokens of each source of a mixture."""


class _Pending(NamedTuple):
    """A step that was dispatched and whose metrics were not fetched yet."""

    number: int
    metrics: dict[str, jax.Array]
    item: Item


@dataclass
class _Run:
    """What the parts of the loop share."""

    settings: Settings
    steps: int
    epoch_steps: int | None
    record: Record
    manager: ocp.CheckpointManager
    sink: sinks.Sink
    bar: progress.Progress
    meter: metrics.Meter
    watch: finite.Watch
    counts: _Counts
    request: interrupt.Request
    evaluators: Sequence[Evaluator]
    averaged: Callable[[Any, tree.Params], tree.Params]
    read: Callable[[int, Mapping[str, Any]], dict[str, float]]
    told: dict[str, float] = field(default_factory=dict)
    """What the source of the batches said since the last line of metrics."""


def numbers(step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers to log of what a step returned."""
    del step
    return {name: float(value) for name, value in metrics.items()}


def total_steps(train: TrainConfig, epoch_steps: int | None) -> int:
    """Steps of the run. ``epoch_steps``: steps that one pass over the data makes, None if nobody knows."""
    if train.steps is not None and train.epochs is not None:
        raise ValueError(f"train: got steps={train.steps} and epochs={train.epochs}; expected one of the two")
    if train.steps is None and epoch_steps is None:
        raise ValueError("train.steps: the length of the data is not known; give train.steps")
    steps = train.steps if train.steps is not None else math.ceil((train.epochs or 1.0) * (epoch_steps or 0))
    if steps < 1:
        raise ValueError(f"train: got {steps} steps; expected at least one")
    return steps


def fit(
    step: Callable[[TrainState, tree.Params, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: tree.Params,
    loader: Loader | Source,
    folder: Path,
    record: Record,
    settings: Settings,
    *,
    steps: int,
    place: Place = jax.device_put,  # type: ignore[assignment]
    evaluators: Sequence[Evaluator] = (),
    averaged: Callable[[Any, tree.Params], tree.Params] = lambda opt_state, params: params,
    epoch_steps: int | None = None,
    flops_per_token: float | None = None,
    read: Callable[[int, Mapping[str, Any]], dict[str, float]] = numbers,
    feed: Callable[[Any, int, Place, int], Read] = prefetch.ahead,
) -> Result:
    """Trains until ``steps``, going on from the newest checkpoint in ``folder`` if there is one.

    Args:
      step: from `make_step`; donates ``state``.
      loader: batches of ``train.batch * train.accumulate`` rows.
      folder: the run's folder; gets `metrics.jsonl` and `checkpoints`.
      record: config and base identity, for checkpoints; resuming a run of others is refused.
      place: puts host arrays [accumulate, rows, ...] on the device or mesh.
      evaluators: each gives metrics, written as ``eval_<name>``.
      averaged: `Optimizer.averaged`: the parameters to evaluate.
      epoch_steps: steps in one pass over the data, for ``epoch`` in the metrics and the default of ``eval.every``.
      flops_per_token: of the model, forward and backward, for MFU.
      read: ``(step, what it returned, on the host) -> numbers to log``; called once for each step.
      feed: how batches of ``loader`` come to the step: ahead of it, or (`prefetch.as_asked`) made for it.

    Raises NonFiniteError after ``train.max_nonfinite`` skipped steps in a row; the last good state is saved.
    """
    with contextlib.ExitStack() as stack:
        manager = disk.open_folder(folder / CHECKPOINTS, settings.checkpoint, settings.eval.goal)
        stack.enter_context(manager)
        resumed = manager.latest_step() is not None
        state, counts = _resume(manager, state, loader, record) if resumed else (state, _Counts())
        start = steps_taken(state)
        first = jax.process_index() == 0
        sink = sinks.open_all(settings.log, folder, start if resumed else None, record.config) if first else sinks.NONE
        stack.callback(sink.close)
        bar = stack.enter_context(progress.show(steps, start, settings.log.progress and first))
        run = _Run(
            settings, steps, epoch_steps, record, manager, sink, bar, metrics.Meter(flops_per_token),
            finite.Watch(settings.train.max_nonfinite, counts.streak), counts,
            stack.enter_context(interrupt.listen()), evaluators, jax.jit(averaged), read,
        )  # fmt: skip
        if resumed:
            bar.say(f"resuming after step {start}")
        elif settings.eval.at_start or settings.eval.general is not None:
            _evaluate(run, 0, state)
        items = feed(loader, settings.train.accumulate, place, settings.train.prefetch)
        return _train(run, step, state, frozen, loader.state(), items)


def _resume(
    manager: ocp.CheckpointManager, state: TrainState, loader: Loader | Source, record: Record
) -> tuple[TrainState, _Counts]:
    state, found = disk.restore(manager, state, record)
    loader.restore(found.cursor)
    return state, _Counts(**{**found.progress, "best": Best(*found.progress["best"])})


def _train(run: _Run, step: Callable, state: TrainState, frozen: tree.Params, cursor: Any, items: Read) -> Result:
    """Steps until something ends the run."""
    number, pending, reason = steps_taken(state), None, None
    while reason is None:
        item = items(state) if number < run.steps else None
        if item is None:
            _log(run, pending, state, cursor)
            reason = "complete" if number >= run.steps else "end_of_data"
            break
        state, device_metrics = step(state, frozen, item.device)
        number, cursor = number + 1, item.cursor
        pending, before = _Pending(number, device_metrics, item), pending
        _log(run, before, state, cursor)  # of the step before, while this one runs
        if _is_due(run, number):
            _log(run, pending, state, cursor)
            pending = None
            reason = _pause(run, number, state, cursor)
    if run.request.signal is None and run.evaluators and run.counts.evaluated_at != number:
        _evaluate(run, number, state)
    _save(run, number, state, cursor)
    run.bar.say(f"{reason} after step {number}")
    return Result(state, number, reason, run.request.exit_code, run.counts.evaluation, run.counts.best)


def _log(run: _Run, pending: _Pending | None, state: TrainState, cursor: Any) -> None:
    """Fetches and writes a step's metrics, waiting for it. Raises NonFiniteError, with ``state`` saved, if it must."""
    if pending is None:
        return
    number, device_metrics, item = pending
    values = run.read(number, jax.device_get(device_metrics))
    counts, tokens = run.counts, int(values.pop("tokens"))
    run.told |= item.metrics
    stop = run.watch.see(number, values, item.host, item.cursor)
    if values["skipped"]:
        run.bar.say(f"step {number}: loss {values['loss']}, grad_norm {values['grad_norm']}: not applied")
    values = by_source.counted(values, tokens, counts.sources)
    counts.num_tokens += tokens
    counts.skipped += int(values["skipped"])
    counts.streak = run.watch.streak
    run.meter.add(tokens)
    values |= {"num_tokens": counts.num_tokens, "skipped": counts.skipped, **run.meter.rates(), **metrics.memory()}
    if run.epoch_steps:
        values["epoch"] = number / run.epoch_steps
    if number % run.settings.log.every == 0 or number == run.steps or stop:
        run.sink.write(number, values | run.told)
        run.told.clear()
    run.bar.update(number, {**values, **item.metrics})
    if stop:
        _save(run, steps_taken(state), state, cursor)
        raise NonFiniteError(run.watch.diagnosis(f"They are saved in {run.manager.directory}/{steps_taken(state)}."))


def _is_due(run: _Run, number: int) -> bool:
    """Whether something must wait for this step: an evaluation, a checkpoint, a signal, the end."""
    every = run.settings.checkpoint.every
    saving = every is not None and number % every == 0
    return saving or _evaluates(run, number) or run.request.signal is not None or number == run.steps


def _evaluates(run: _Run, number: int) -> bool:
    every = run.settings.eval.every or run.epoch_steps
    return bool(run.evaluators) and (number == run.steps or (every is not None and number % every == 0))


def _pause(run: _Run, number: int, state: TrainState, cursor: Any) -> str | None:
    """Evaluates and saves what is due after a step; the reason to stop, if there is one."""
    reason = None if run.request.signal is None else signal.Signals(run.request.signal).name
    better = False
    if reason is None and _evaluates(run, number):
        better = _evaluate(run, number, state)
        patience = run.settings.eval.patience
        if patience is not None and run.counts.best.waited >= patience and number < run.steps:
            reason = "early_stop"
    every = run.settings.checkpoint.every
    if (every is not None and number % every == 0) or (better and run.settings.checkpoint.keep_best):
        _save(run, number, state, cursor)
    return reason


def _evaluate(run: _Run, number: int, state: TrainState) -> bool:
    """Runs all evaluators; whether this is the best so far."""
    run.meter.pause()
    shown = state._replace(trainable=run.averaged(state.opt_state, state.trainable))
    values: dict[str, float] = {}
    for evaluator in run.evaluators:
        values |= evaluator(number, shown)
    run.counts.best, better = evaluate.judge(run.settings.eval, run.counts.best, number, values)
    run.counts.evaluation, run.counts.evaluated_at = values, number
    run.sink.write(number, {f"eval_{name}": value for name, value in values.items()})
    listed = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    run.bar.say(f"step {number} held out: {listed}{'  (best so far)' if better else ''}")
    return better


def _save(run: _Run, number: int, state: TrainState, cursor: Any) -> None:
    """A checkpoint of this step, ranked by its evaluation if it has just had one."""
    counts = run.counts
    score = counts.evaluation.get(run.settings.eval.metric) if counts.evaluated_at == number else None
    record = dataclasses.replace(run.record, cursor=cursor, progress=dataclasses.asdict(counts))
    disk.save(run.manager, number, state, record, score if score is None or math.isfinite(score) else None)
