"""Evaluation while training: sums over held-out batches, which checkpoint is best, and when to stop early."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from jaxft.objectives import calibration, terms
from jaxft.objectives.terms import Means
from jaxft.training import by_source, prefetch
from jaxft.training.config import EvalConfig
from jaxft.training.prefetch import Host, Place
from jaxft.training.state import TrainState
from jaxft.training.step import Frozen

Evaluator = Callable[[int, TrainState], Mapping[str, float]]
"""``(step, state) -> metrics``; the state's trainable arrays are those to evaluate (schedule-free's average)."""

LARGEST_EXPONENT = 700.0  # exp of more is no float


def held_out(
    eval_step: Callable[..., Means],
    frozen: Frozen,
    batches: Callable[[], Iterable[Host]],
    place: Place,
    config: EvalConfig,
    accumulate: int = 1,
) -> Evaluator:
    """Evaluates on ``batches()``, made anew each time: ``loss``, the objective's metrics, and ``perplexity``."""
    measured = measure(eval_step, frozen, batches, place, config, accumulate)
    return lambda step, state: summary(measured(state))


def measure(
    eval_step: Callable[..., Means],
    frozen: Frozen,
    batches: Callable[[], Iterable[Host]],
    place: Place,
    config: EvalConfig,
    accumulate: int = 1,
) -> Callable[[TrainState], dict[str, Any]]:
    """``state -> means`` on the host, over all tokens of all batches, whatever the batches' sizes."""

    def means(state: TrainState) -> dict[str, Any]:
        sums: Means | None = None
        for host in itertools.islice(batches(), config.batches):
            batch = place(prefetch.split(host, accumulate))
            more = eval_step(state.trainable, state.start, frozen, batch, state.carry)
            sums = more if sums is None else terms.add(sums, more)
        if sums is None:
            raise ValueError("eval: there are no held-out batches; leave evaluation out or give data for it")
        # Of a source of a mixture that has no held-out data there is nothing to say.
        seen = {n: mean for n, mean in sums.items() if not n.startswith(by_source.PREFIX) or (mean.weight > 0).any()}
        return jax.device_get(terms.values(seen))

    return means


def summary(values: Mapping[str, Any]) -> dict[str, float]:
    """``loss`` is the sum of its terms; ``perplexity`` is exp of ``nll``, where there is one, of each source too; the
    ``calibration_error`` is that of a reliability table."""
    concluded = calibration.concluded(values)
    out = {name: float(value) for name, value in concluded.items() if not by_source.is_share(name)}
    parts = [name for name in out if name.startswith("loss/")]
    loss = sum(out[name] for name in parts)
    if len(parts) == 1:
        del out[parts[0]]
    own = [name for name in out if name.startswith(by_source.PREFIX) and name.endswith("/nll")]
    for name in [*(["nll"] if "nll" in out else []), *own]:
        out[f"{name.removesuffix('nll')}perplexity"] = math.exp(min(out[name], LARGEST_EXPONENT))
    return {"loss": loss, **out}


class Best(NamedTuple):
    """The best evaluation so far, and how many have passed without a better one."""

    value: float | None = None
    step: int | None = None
    waited: int = 0


def cost(config: EvalConfig, metrics: Mapping[str, float]) -> float:
    """What is to be as low as possible, whichever way ``eval.metric`` is better; infinite if it is not finite."""
    value = metrics[config.metric]
    return (value if config.goal == "min" else -value) if math.isfinite(value) else math.inf


def judge(config: EvalConfig, best: Best, step: int, metrics: Mapping[str, float]) -> tuple[Best, bool]:
    """The best so far with this evaluation taken in, and whether it is this one."""
    if config.metric not in metrics:
        raise ValueError(f"eval.metric: got {config.metric!r}; this run evaluates {', '.join(sorted(metrics))}")
    value = metrics[config.metric]
    sign = 1 if config.goal == "min" else -1
    if math.isfinite(value) and (best.value is None or sign * (best.value - value) > 0):
        enough = best.value is None or sign * (best.value - value) > config.min_delta
        return Best(value, step, 0 if enough else best.waited + 1), True
    return best._replace(waited=best.waited + 1), False
