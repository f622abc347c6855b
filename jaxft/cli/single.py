"""A single run before its first step: the model with its methods, the optimiser, the state, the score."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from jaxft.checkpoint.state import Record
from jaxft.cli import assemble, forgetting, summary
from jaxft.cli import critic as critic_
from jaxft.cli import job as job_
from jaxft.cli import others as others_
from jaxft.cli.critic import Critic
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.core.hooks import Hooks
from jaxft.model import Model
from jaxft.models.decoder import Execution
from jaxft.objectives import terms
from jaxft.rollout.score import Score
from jaxft.training import step
from jaxft.training.loop import Result
from jaxft.training.optim import Optimizer
from jaxft.training.state import TrainState


@dataclass(frozen=True)
class Begun:
    """What a run has when its data come in."""

    base: Model
    """Without its parameters, which are in ``frozen``."""
    dtype: Any
    """Of the computation."""
    how: Execution
    first: TrainState
    places: TrainState | None
    """Shardings of the state."""
    frozen: tree.Params
    """As the step wants them."""
    models: step.Frozen
    """``frozen``, with the other models of the step if there are any."""
    others: dict[str, Model]
    """Other models that the step or a source of batches scores, by view."""
    optimizer: Optimizer
    hooks: Hooks
    score: Score
    record: Record
    flops: float
    changed: set[str]
    """See `assemble.Split`."""
    critic: Critic | None
    """The value model, whose parameters are in the state and in ``frozen``."""
    beside: dict[str, tree.Params]
    """See `begin`."""

    @property
    def views(self) -> dict[str, tree.Params]:
        """The parameters of the other models, by view."""
        return self.models.others if isinstance(self.models, step.Models) else {}


def begin(
    config: RunConfig,
    base: Model,
    steps: int,
    mesh: Mesh | None,
    console: Console,
    statistics: dict[str, Any],
    beside: Mapping[str, tree.Params] = MappingProxyType({}),
) -> Begun:
    """Applies the methods and makes the first state.

    ``statistics``: what methods that begin from data ask of them. ``beside``: parameters of models that no step scores,
    which may share arrays with the base; they come back as the run holds them."""
    how = assemble.execution(config, mesh)
    others = others_.load(config, base, mesh)
    critic = critic_.make(config, base, mesh, steps)
    more = others_.projected(config, base, others) | ({} if critic is None else {terms.CRITIC: critic.made})
    parts = assemble.split(config, base, mesh, statistics, more)
    hooks = assemble.hooks(config, parts, steps)
    fisher = forgetting.weights(config, base, parts, how)
    optimizer, first, places = assemble.start(config, parts, steps, mesh, hooks, fisher)
    whole = tree.count(terms.actor(parts.trainable)) + tree.count(terms.actor(parts.frozen))
    counted = f"{tree.count(parts.trainable):,} of {whole + (critic.adds if critic else 0):,}"
    methods = " + ".join(choice.name for choice in config.peft)
    console.print(f"training {counted} parameters for {steps:,} steps with {methods}")
    record = job_.record(config, parts.frozen)
    flops = assemble.flops_per_token(config, base, parts)
    score = others_.scorer(config, base, how, others)
    dtype = base.params["embed"]["tokens"].dtype
    if critic is not None:
        score = critic_.scorer(config, critic, score, dtype, how)
        critic = dataclasses.replace(critic, made=(None, None, None))
    base, frozen, beside = job_.handed_over(base, parts.frozen, how.unroll, beside)
    models: step.Frozen = step.Models(frozen, others_.handed_over(others, how.unroll)) if others else frozen
    return Begun(
        base, dtype, how, first, places, frozen, models, others, optimizer, hooks, score, record, flops, parts.changed,
        critic, dict(beside),
    )  # fmt: skip


def finisher(config: RunConfig, begun: Begun, console: Console) -> Callable[[Result, tree.Params, Path], int]:
    """See `Job.finish`."""

    def finish(result: Result, trained: tree.Params, folder: Path) -> int:
        params = tree.combine(trained, begun.frozen)
        written = job_.write(config, begun.base, params, begun.changed, str(begun.dtype), folder)
        if config.value.save and begun.critic is not None:
            console.print(f"value model: {critic_.write(begun.critic, params, str(begun.dtype), folder)}")
        summary.show(console, config, result, folder, written)
        return 0

    return finish
