"""What `jaxft train` does for objectives on what the policy writes: prompts instead of examples, a source of rollouts
instead of a loader, rewards beside the answers to held-out prompts.

Objectives of data can learn from it too: those of pairs, with rewards, from the best and the worst completion of each
prompt; a distillation from the student's completions, in the place of the data's (`student`)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from jaxft import peft, rewards
from jaxft.border.errors import ConfigError
from jaxft.cli import answers, assemble, forgetting, judge_models, judging, reward_models, samples, single, watching
from jaxft.cli import job as job_
from jaxft.cli.job import Job
from jaxft.cli.reward_models import RewardModels
from jaxft.config import RunConfig
from jaxft.data import DataConfig, Loader, questions
from jaxft.data.questions import Questions
from jaxft.model import Model
from jaxft.objectives import OBJECTIVES, Distil
from jaxft.objectives.rollouts import observe
from jaxft.objectives.terms import Objective
from jaxft.rollout import policy
from jaxft.rollout.alternating import Alternating
from jaxft.rollout.config import RolloutConfig
from jaxft.rollout.source import Rows, Source
from jaxft.sharding import mesh as mesh_
from jaxft.training import loop, prefetch, step
from jaxft.training.evaluate import Evaluator

UNUSED = {
    "packing": "a rollout's sequences are padded to one width",
    "overlong": "a prompt that is too long is a bad row (data.on_error)",
    "loss_on": "the completion is what is learnt",
    "cache": "prompts are not kept on disk",
    "prompts": "prompt templates are not told to rollouts yet",
}
"""Keys of `data` that say nothing about prompts, and why; only where they are set to something that would."""
LEFT = {"packing": ("best_fit", "none")}


def wanted(config: RunConfig) -> bool:
    """Whether the run learns from what its policy writes, and reads prompts alone."""
    return OBJECTIVES[config.objective.name].rows == "rollout" or _pairs(config)


def mixes(config: RunConfig) -> bool:
    """Whether a student learns from its own completions in the place of the data's."""
    return isinstance(config.objective.value, Distil) and (config.rollout != RolloutConfig() or bool(config.rewards))


def _pairs(config: RunConfig) -> bool:
    """Whether completions are judged and become pairs, which an objective on log-probabilities would read as data."""
    objective = OBJECTIVES[config.objective.name]
    judged = objective.rows == "pairs" and "logp" in objective.asked(config.objective.value).needs
    return judged and (bool(config.rewards) or config.rollout != RolloutConfig())


def _objective(config: RunConfig) -> Objective:
    found = OBJECTIVES[config.objective.name]
    return found if found.estimate is not None else dataclasses.replace(found, estimate=observe)


def check(config: RunConfig) -> None:
    """Raises ConfigError where the sections `rollout` and `rewards` do not fit the rest, before anything is read."""
    name, section = config.objective.name, config.rollout
    watching.check(config, wanted(config))
    if mixes(config):
        return _check_student(config)
    if section.fraction is not None:
        raise ConfigError(f"`rollout.fraction`: mixes what a student learns from, and objective {name} is no distil")
    if not wanted(config):
        for key, given in (("rollout", section != RolloutConfig()), ("rewards", bool(config.rewards))):
            if given:
                raise ConfigError(f"`{key}`: objective {name} learns from data and not from rollouts; leave it out")
        return
    if not config.rewards:
        known = ", ".join(rewards.REWARDS)
        raise ConfigError(
            f"`rewards` must be given: objective {name} learns from what reward functions say of completions; a list "
            f"such as [{{name: math}}] (there are {known}), or [{{function: file.py:name}}]"
        )
    if not any(choice.value.weight for choice in config.rewards):
        raise ConfigError(
            "`rewards`: all have the weight 0, of rewards that are only watched; expected one that counts"
        )
    compares = _pairs(config) or _objective(config).compares(config.objective.value)
    if section.samples == 1 and (compares or section.dynamic):
        what = f"objective {name}" if compares else "rollout.dynamic"
        raise ConfigError(
            f"`rollout.samples`: got 1; {what} compares completions of one prompt with each other: expected at least 2"
        )
    _check_sizes(config)
    usual = DataConfig()
    for key, why in UNUSED.items():
        got = getattr(config.data, key)
        if got not in LEFT.get(key, (getattr(usual, key),)):
            raise ConfigError(f"`data.{key}`: got {got}, for objective {name}: {why}; leave it out")
    if config.reference.precompute:
        raise ConfigError("`reference.precompute`: what a policy will write is not known beforehand; leave it out")
    for method in [choice.value for choice in config.peft]:
        if peft.method_of(method).calibrate(method) is not None:
            raise ConfigError("`peft.init`: it begins from training data, and a run on rollouts has prompts alone")
    if config.eval.batches is not None and config.eval.general is None:
        raise ConfigError("`eval.batches`: held-out prompts are counted by eval.rewards and eval.exact_match")


def _check_sizes(config: RunConfig) -> None:
    """Raises ConfigError where a rollout cannot be cut into steps, or does not fit a row or the machine."""
    name, section, rows = config.objective.name, config.rollout, config.train.batch * config.train.accumulate
    if config.sweep:
        raise ConfigError(f"`sweep`: members with rollouts of their own are not there yet; train {name} one by one")
    if config.mesh.distributed:
        raise ConfigError("`mesh.distributed`: rollouts on several hosts are not there yet; use the devices of one")
    count = section.prompts if _pairs(config) else section.sequences
    if count % rows:
        made = f"{section.samples} samples are {section.sequences} completions"
        made = f"a pair of {section.samples} samples are {count} pairs" if _pairs(config) else made
        raise ConfigError(
            f"`rollout`: {section.prompts} prompts x {made}; expected a multiple of the {rows} rows of a step "
            f"(train.batch {config.train.batch} x train.accumulate {config.train.accumulate})"
        )
    if judging.room(config) < 1:
        raise ConfigError(
            f"`data.max_length`: got {config.data.max_length} for a prompt and its completion, of which "
            f"rollout.max_new_tokens takes {section.max_new_tokens}; raise it, or lower that"
        )


def _check_student(config: RunConfig) -> None:
    """Raises ConfigError for what a student cannot be told of its own completions."""
    settings, usual = config.objective.value, DataConfig()
    if settings.teacher == "stored":
        raise ConfigError(
            "`objective.teacher`: got stored with a `rollout` section: what a student will write is not known "
            "beforehand; use a live teacher, or leave the section out"
        )
    if settings.divergence == "uld":
        raise ConfigError(
            "`objective.divergence`: got uld with a `rollout` section: a student's completions are not told again in "
            "another tokenizer's tokens; use a teacher with the student's tokenizer, or leave the section out"
        )
    if config.rollout.dynamic:
        raise ConfigError(
            "`rollout.dynamic`: a student learns from every completion, whatever its reward; leave it out"
        )
    if config.data.prompts != usual.prompts:
        raise ConfigError(f"`data.prompts`: {UNUSED['prompts']}; leave it out")
    _check_sizes(config)


def settled(config: RunConfig) -> RunConfig:
    """The config with what `eval.metric: loss` means for a policy that has no held-out loss."""
    if not wanted(config) or config.eval.metric != "loss":
        return config
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, metric="reward", goal="max"))


@dataclass(frozen=True)
class Asking:
    """The training data of such a run, as far as others ask about them."""

    questions: Questions
    config: RunConfig

    @property
    def batches_per_epoch(self) -> int:
        """Steps in one pass over the prompts; more of them with dynamic sampling."""
        section, rows = self.config.rollout, self.config.train.batch * self.config.train.accumulate
        count = section.prompts if _pairs(self.config) else section.sequences
        return -(-len(self.questions.train) // section.prompts) * section.epochs * count // rows

    def report(self) -> "Asking":
        """Tells of itself."""
        return self

    def lines(self) -> list[str]:
        """The prompts in words."""
        found, section = self.questions, self.config.rollout
        lengths = [len(prompt.tokens) for prompt in found.train]
        held = "" if found.held_out is None else f", {len(found.held_out):,} held out"
        columns = ", ".join(found.columns) or "none"
        return [
            f"{len(found.train):,} prompts of {min(lengths)} to {max(lengths)} tokens{held}; columns: {columns}",
            f"a rollout: {section.prompts} prompts x {section.samples} completions",
            *([f"{found.skipped:,} bad rows skipped"] if found.skipped else []),
        ]


@dataclass(frozen=True)
class Material:
    """See `job.Material`."""

    train: Asking
    steps: int


def material(config: RunConfig, base: Model) -> Material:
    """Reads the prompts."""
    found = Asking(questions.prepare(config.data, base.tokenizer, _room(config, base)), config)
    return Material(found, loop.total_steps(config.train, found.batches_per_epoch))


def _room(config: RunConfig, base: Model) -> int:
    """Tokens that a prompt may have."""
    longest = judging.room(config)
    if base.config.learned_positions:
        slots = sum(assemble.virtual(config).values())
        longest = min(longest, base.config.max_positions - config.rollout.max_new_tokens - slots)
    return longest


def job(config: RunConfig, base: Model, material: Material, mesh: Mesh | None, console: Console) -> Job:
    """A single run on rollouts."""
    models = reward_models.load(config, base, mesh)
    begun = single.begin(config, base, material.steps, mesh, console, {}, models.params)
    base, asked = begun.base, material.train.questions
    objective, settings = _objective(config), config.objective.value
    judge = _judge(config, begun, models, asked, console)
    general = forgetting.examples(config, base, assemble.virtual(config).get("prompt", 0))
    held = judging.held_out(config, asked)
    harmless = watching.harmless(config, base, judging.room(config)) if held else []
    if held or general is not None:
        beside = [choice.value for choice in config.rewards]
        alone = [n for n, one in zip(judge.rewards.names, beside, strict=True) if not _compares(one)]
        _refuse_metric(config, alone, bool(held))
    make = _sources(config, begun, asked, judge)

    def begin(folder: Path) -> tuple[Any, list[Evaluator]]:
        source = make(folder)
        found = []
        if general is not None:
            found += [forgetting.evaluator(config, general, base, begun.dtype, begun.how, begun.frozen)]
        if held:
            watch = watching.Watch(config, begun, harmless)
            found += [judging.evaluator(config, held, begun, judge, folder, watch)]
        return source, found

    shardings = job_.shardings(begun.places, begun.models, mesh)
    run = step.make_step(objective, settings, begun.score, begun.optimizer, shardings, begun.hooks)
    finish = single.finisher(config, begun, console)
    rest = (begun.record, begun.optimizer, begun.flops)
    return Job(run, begun.first, begun.models, *rest, begin, finish, feed=prefetch.as_asked)


def student(
    config: RunConfig, begun: single.Begun, models: RewardModels, console: Console
) -> Callable[[Loader, Path], Alternating]:
    """Given the data and the run's folder: what a student learns from that is told of its own completions too. The
    prompts are those of the same data."""
    found = Asking(questions.prepare(config.data, begun.base.tokenizer, _room(config, begun.base)), config)
    console.print(*found.lines(), sep="\n")
    asked, section = found.questions, config.rollout
    make = _sources(config, begun, asked, _judge(config, begun, models, asked, console))
    fraction = 1.0 if section.fraction is None else section.fraction
    return lambda loader, folder: Alternating(loader, make(folder), fraction, section.seed)


def _judge(
    config: RunConfig, begun: single.Begun, models: RewardModels, asked: Questions, console: Console
) -> judging.Judge:
    """The judge of a run, with the models that it has loaded."""
    table = models.table(begun.beside, begun.dtype, begun.how)
    table = judge_models.table(table, Path(str(config.run_dir)), begun.how.mesh)
    return judging.judge(config, begun.base, asked, console, table)


def _sources(
    config: RunConfig, begun: single.Begun, asked: Questions, judge: judging.Judge
) -> Callable[[Path], Source]:
    """Given the run's folder, where samples go: the rollouts of a run."""
    base, objective, settings = begun.base, _objective(config), config.objective.value
    pad = base.tokenizer.eos_token_id if base.tokenizer.pad_token_id is None else base.tokenizer.pad_token_id
    rows = Rows(
        config.train.batch * config.train.accumulate,
        pad,
        assemble.virtual(config).get("prompt", 0),
        config.data.length_multiple,
        _pairs(config),
    )
    end, about = answers.ends(config, base), {"execution": begun.how, "tokenizer": base.tokenizer}
    sample = policy.sampler(config.rollout, base.config, begun.frozen, dtype=begun.dtype, end=end, **about)
    annotate = policy.annotator(
        begun.score,
        objective.asked(settings).rollout_needs,
        functools.partial(objective.estimate, settings),  # type: ignore[arg-type]
        begun.frozen,
        others=begun.views,
        place=mesh_.placer(begun.how.mesh),
        rows=config.train.batch,
    )
    running = {name: float(value) for name, value in objective.running(settings).items()}
    how: dict[str, Any] = {"running": running, "seed": config.data.seed, "shuffle": config.data.shuffle}
    given = (config.rollout, asked, judge.rewards, sample, annotate, rows)
    return lambda folder: Source(*given, **how, table=samples.Samples(folder))


def _compares(reward: Any) -> bool:
    """Whether a reward says nothing of a single completion."""
    return isinstance(reward, rewards.Judge) and reward.compares


def _refuse_metric(config: RunConfig, names: Sequence[str], held: bool) -> None:
    """Raises ConfigError for an `eval.metric` that the run will not evaluate. ``names``: of rewards of one answer."""
    known = list(forgetting.METRICS) if config.eval.general is not None else []
    if held:
        known += ["exact_match"] if config.eval.exact_match else []
        known += ["reward", *(f"rewards/{name}" for name in names)] if config.eval.rewards and names else []
    if config.eval.metric not in known:
        found = ", ".join(sorted(known)) or "nothing"
        why = "" if names else (
            "; the judge compares completions of one prompt, of which an evaluation has one: give it `reference`, a "
            "column to compare with, or `method: pointwise`, or leave the held-out data out"
        )  # fmt: skip
        raise ConfigError(f"`eval.metric`: got {config.eval.metric!r}; this run evaluates {found}{why}")
