"""What a run does to what the model knew: a general set measured beside the task's, and what holds parameters to it."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import data
from jaxft.border.errors import ConfigError
from jaxft.cli import assemble, heads
from jaxft.cli.assemble import Split
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.data import DataConfig, Examples, Loader, sources
from jaxft.data.errors import called
from jaxft.model import Model
from jaxft.models import slots
from jaxft.models.decoder import Execution
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.rollout import members, score
from jaxft.sharding import mesh as mesh_
from jaxft.training import evaluate, fisher, step, sweep
from jaxft.training.evaluate import Evaluator
from jaxft.training.state import TrainState

METRICS = ("general_nll", "general_perplexity")
OWN = (
    "sources", "mix", "subset", "split", "limit", "columns", "task_column", "task", "format",
    "prompts", "prompts_a_row", "prompts_seed",
    "eval_path", "eval_split", "eval_fraction", "eval_examples",
)  # fmt: skip
"""Settings of the task's data that say nothing of other data; how rows become tokens is common to all."""


def check(config: RunConfig) -> None:
    """Raises ConfigError for what a sweep or a reward model cannot do, and for sources that are not there, before
    anything is read."""
    for key, given in (("eval.general", config.eval.general), ("optim.ewc", config.optim.ewc)):
        if heads.scores(config) and given:
            raise ConfigError(f"`{key}`: a reward model has no head over the vocabulary; leave it out")
    asked = OBJECTIVES[config.objective.name].asked(config.objective.value)
    numbers = getattr(config.objective.value, "kl_sources", ())
    names = sources.mixed(config.data)[0] if config.data.sources else []
    if numbers and max(numbers) >= len(names):
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names)) or "none: there are no data.sources"
        raise ConfigError(f"`objective.kl_sources`: got {list(numbers)}; expected numbers of sources: {listed}")
    follow = OBJECTIVES[config.objective.name].follow(config.objective.value)
    for key, given in (("optim.ewc", config.optim.ewc), ("optim.l2_start", config.optim.l2_start)):
        if follow is not None and given:
            raise ConfigError(
                f"`{key}`: pulls to the start, which objective.ref_sync_steps moves; leave out one of them"
            )
    for key, given in (("optim.ewc", config.optim.ewc), ("objective.kl_to_start", "start" in asked.views)):
        if config.sweep and given:
            raise ConfigError(f"`{key}`: each member of a sweep has a start of its own; train them one by one")


def anywhere(config: RunConfig, rows: Examples) -> RunConfig:
    """The config for rows that may be of no mixture: there the distance from the start counts on all of them."""
    if rows.mixture is not None or not getattr(config.objective.value, "kl_sources", ()):
        return config
    settings = dataclasses.replace(config.objective.value, kl_sources=())
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, value=settings))


def elsewhere(config: DataConfig, path: str | Sequence[str], **changes: Any) -> DataConfig:
    """The settings of the task's data for rows that stand somewhere else."""
    fresh = {name: getattr(DataConfig(), name) for name in OWN}
    return dataclasses.replace(config, path=path, shuffle=False, **{**fresh, **changes})


def examples(config: RunConfig, base: Model, reserved: int) -> Examples | None:
    """The general set (`eval.general`), whatever the objective's rows; None: there is none."""
    if config.eval.general is None:
        return None
    with called("data.path", "eval.general"):
        return data.prepare(elsewhere(config.data, config.eval.general), base.tokenizer, reserved=reserved).train


def measure(
    config: RunConfig,
    general: Examples,
    base: Model,
    dtype: Any,
    how: Execution,
    frozen: step.Frozen,
    reserved: int,
    differs: tree.Params | None = None,
    count: int = 1,
) -> Callable[[TrainState], dict[str, Any]]:
    """Means over the tokens of the general set; ``differs`` and ``count``: of a sweep's members."""
    settings = elsewhere(config.data, "")
    asked: dict[str, Any] = {"dtype": dtype, "execution": how}
    if differs is None:
        run = step.make_eval_step(OBJECTIVES["sft"], SFT(), score.make_score(base.config, **asked))
    else:
        scored = members.make_score(base.config, ("logp",), differs, **asked)
        run = sweep.make_eval_step(OBJECTIVES["sft"], SFT(), scored, count)
    batches = lambda: Loader(general, settings, batch_rows=config.train.batch, epochs=1, reserved=reserved)  # noqa: E731
    return evaluate.measure(run, frozen, batches, mesh_.placer(how.mesh), config.eval)


def told(means: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the general set, from its means."""
    values = evaluate.summary(means)
    return {name: values[name.removeprefix("general_")] for name in METRICS}


def evaluator(config: RunConfig, general: Examples, base: Model, dtype: Any, how: Execution, frozen: Any) -> Evaluator:
    """``(step, state) -> metrics`` of the general set."""
    means = measure(config, general, base, dtype, how, frozen, assemble.virtual(config).get("prompt", 0))
    return lambda step, state: told(means(state))


def measured(config: RunConfig, base: Model, params: tree.Params, how: Execution) -> dict[str, float]:
    """The metrics of the general set for a model as it is; empty if there is none."""
    reserved = slots.prompt_length(params)
    general = examples(config, base, reserved)
    if general is None:
        return {}
    nothing, dtype = jax.tree.map(lambda leaf: None, params), base.params["embed"]["tokens"].dtype
    means = measure(config, general, base, dtype, how, nothing, reserved)
    return told(means(TrainState(jnp.int32(0), params, None, None, {}, None, jax.random.key(0))))


def weights(config: RunConfig, base: Model, parts: Split, how: Execution) -> tree.Params | None:
    """The Fisher information of `optim.ewc`, at the parameters as the run begins; None without it."""
    section = config.optim
    if not section.ewc or section.ewc_data is None:
        return None
    reserved = assemble.virtual(config).get("prompt", 0)
    settings = elsewhere(config.data, section.ewc_data, packing="none")
    with called("data.path", "optim.ewc_data"):
        found = data.prepare(settings, base.tokenizer, reserved=reserved).train
    loader = Loader(found, dataclasses.replace(settings, shuffle=True), batch_rows=1, epochs=1, reserved=reserved)
    documents = itertools.islice(loader, section.ewc_examples)
    scanned = dataclasses.replace(how, unroll=False)
    scored = score.make_score(base.config, dtype=base.params["embed"]["tokens"].dtype, execution=scanned)
    place, width = mesh_.placer(how.mesh), mesh_.row_shards(how.mesh)
    return fisher.estimate(scored, parts.trainable, parts.frozen, documents, place, width)
