"""`jaxft train CONFIG --sweep ...`: many runs as one, on one copy of the model and in one compiled step.

What a run is, is in `train`; here is what a sweep puts in the place of its parts: members' parameters stacked, their
own schedules and seeds, their own folders (`run_dir/members/<name>`, each like a run's), and at the end a ranking.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from jaxft import run_dir
from jaxft.border.errors import ConfigError
from jaxft.cli import answers, assemble, forgetting, members, ranking
from jaxft.cli import job as job_
from jaxft.cli.assemble import Split
from jaxft.cli.job import Job, Material
from jaxft.cli.members import Member
from jaxft.config import RunConfig
from jaxft.core import align, many, tree
from jaxft.core import hooks as hooks_
from jaxft.core.hooks import Hooks
from jaxft.core.weight import Slot
from jaxft.data import Prompt
from jaxft.model import Model
from jaxft.models.decoder import Execution
from jaxft.peft import native
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.training import evaluate, optim, prefetch, sweep
from jaxft.training.evaluate import Evaluator
from jaxft.training.ledger import Each, Ledger
from jaxft.training.loop import Result
from jaxft.training.optim import Optimizer
from jaxft.training.state import TrainState


def job(config: RunConfig, base: Model, material: Material, mesh: Mesh | None, console: Console) -> Job:
    """All members of a sweep as one run."""
    runs = members.expand(config)
    how = assemble.execution(config, mesh)
    one, parts, differs, sizes = split(runs, base, mesh, [*statistics(runs, base, material, how)])
    assemble.check_tasks(one.trainable, material.prepared.train, material.prepared.held_out)
    hooks = assemble.hooks(runs[0].config, one, material.steps)
    if hooks is not hooks_.NONE and any(member.config.peft != runs[0].config.peft for member in runs):
        raise ConfigError("`sweep`: peft.* cannot differ for a method that changes its parameters in every step")
    optimizer, first, places = start(runs, parts, material.steps, mesh, hooks)
    methods = " + ".join(choice.name for choice in config.peft)
    each = f"{sizes[0]:,} parameters each" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,} parameters"
    console.print(
        f"training {len(runs)} members of {each} side by side for {material.steps:,} steps with {methods}, on one copy "
        f"of the model's {tree.count(one.frozen):,}"
    )
    record, flops = job_.record(config, parts.frozen), assemble.flops_per_token(config, base, one)
    score = assemble.scorer(config, base, how, differs)
    dtype = base.params["embed"]["tokens"].dtype
    asked = answers.chosen(config, material.prepared.held_out, material.prepared.asked, base)
    reserved = assemble.virtual(config).get("prompt", 0)
    general = forgetting.examples(config, base, reserved)
    constants, common = tree.partition(parts.frozen, differs)
    base, common, _ = job_.handed_over(base, common, how.unroll)
    frozen = tree.combine(constants, common)
    changed = one.changed
    del parts, one, common

    objective, settings = assemble.objective(config, material.prepared.train), config.objective.value
    eval_step = sweep.make_eval_step(objective, settings, score, len(runs))
    if material.held_out is not None:
        batch = prefetch.split(material.train.batch(0), config.train.accumulate)
        job_.refuse_metric(config, jax.eval_shape(eval_step, first.trainable, first.start, frozen, batch, first.carry))
    elif general is not None:
        job_.refuse_metric(config)
    ledger = Ledger([member.folder for member in runs], config.log.every, material.steps)

    def begin(folder: Path) -> tuple[Any, list[Evaluator]]:
        for member in runs:
            run_dir.write(member.config)
        found: list[Each] = []
        if material.held_out is not None:
            place, accumulate = mesh_.placer(mesh), config.train.accumulate
            measured = evaluate.measure(eval_step, frozen, material.held_out, place, config.eval, accumulate)
            found += [lambda step, state: each_summary(measured(state), len(runs))]
        if general is not None:
            more = forgetting.measure(config, general, base, dtype, how, frozen, reserved, differs, len(runs))
            found += [lambda step, state: [forgetting.told(means) for means in each_mean(more(state), len(runs))]]
        if asked:
            found += [answered(runs, asked, base, dtype, how, frozen, differs)]
        return loader, [ledger.evaluator(found, config.eval)] if found else []

    def finish(result: Result, trained: tree.Params, folder: Path) -> int:
        ledger.close()
        for index, member in enumerate(runs):
            params = alone(trained, frozen, differs, index)
            job_.write(member.config, base, params, changed, str(dtype), member.folder)
        return ranking.show(console, config, runs, result, folder)

    own_order = len({member.config.data.seed for member in runs}) > 1
    loader: Any = material.train
    if own_order:
        loader = sweep.Orders([assemble.loaders(member.config, material.prepared)[0] for member in runs])
    shardings = job_.shardings(places, frozen, mesh)
    step = sweep.make_step(objective, settings, score, optimizer, len(runs), own_order, shardings, hooks)
    return Job(step, first, frozen, record, optimizer, flops, begin, finish, ledger.read)


def statistics(runs: Sequence[Member], base: Model, material: Material, how: Execution) -> Iterator[dict[str, Any]]:
    """`assemble.statistics` of each member, measured once for members that ask for the same."""
    asked, found = None, {}
    for member in runs:
        if (member.config.peft, member.config.data) != asked:
            asked = member.config.peft, member.config.data
            found = assemble.statistics(member.config, base, material.prepared, how)
        yield found


def split(
    runs: Sequence[Member], base: Model, mesh: Mesh | None, statistics: Sequence[dict[str, Any]]
) -> tuple[Split, Split, tree.Params, list[int]]:
    """The first member's parameters, those of all stacked where they differ, a tree that says where they do, and the
    trained parameters of each, from few to many.

    Raises ConfigError where members differ in more than numbers."""
    made = [assemble.adapted(member.config, base, each) for member, each in zip(runs, statistics, strict=True)]
    params, mask, rates = made[0]
    for member, (other, _, _) in zip(runs, made, strict=True):
        if jax.tree.structure(other) != jax.tree.structure(params):
            raise ConfigError(f"`sweep`: {member.name} is another program than {runs[0].name}; {members.CAN}")
    try:
        trainable, frozen, differs = align.together([p for p, _, _ in made], mask)
    except ValueError as error:
        raise ConfigError(f"`sweep`: these members cannot be one run: {error}") from None
    trained = [tree.partition(p, mask)[0] for p, _, _ in made]
    shapes = {tuple(a.shape for a in jax.tree.leaves(own)) for own in trained}
    sizes = sorted(map(tree.count, trained))
    if len(shapes) > 1 and runs[0].config.optim.name == "adafactor":
        raise ConfigError("`sweep`: adafactor takes means over whole matrices, padding of smaller ranks too; use adamw")
    changed = native.changed(params, base.params)
    one = Split(*tree.partition(params, mask), rates, None, changed)
    if mesh is None:
        return one, Split(trainable, frozen, rates, None, changed), differs, sizes

    def place(differs: bool, place: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(None, *place.spec)) if differs else place

    ours, theirs = tree.partition(jax.tree.map(place, differs, rules.shardings(params, mesh)), mask)
    placed = Split(jax.device_put(trainable, ours), jax.device_put(frozen, theirs), rates, ours, changed)
    return one, placed, differs, sizes


def start(
    runs: Sequence[Member], parts: Split, steps: int, mesh: Mesh | None, hooks: Hooks
) -> tuple[Optimizer, TrainState, TrainState | None]:
    """`assemble.start` of all members."""
    config = runs[0].config
    default, factors = assemble.rates(config, parts)
    for member in runs:
        if jax.tree.leaves(assemble.rates(member.config, parts)) != jax.tree.leaves((default, factors)):
            raise ConfigError(f"`sweep`: {member.name} divides its learning rate in another way; {members.CAN}")
    peaks = [optim.peak(member.config.optim, default) for member in runs]
    optimizer = sweep.make_optimizer(config.optim, sweep.member(parts.trainable, 0), peaks, steps, factors)
    keys = jnp.stack([assemble.state_key(member.config) for member in runs])
    return optimizer, *assemble.first_state(config, parts, optimizer, keys, mesh, jax.vmap(hooks.start))


def alone(trained: tree.Params, frozen: tree.Params, differs: tree.Params, index: int) -> tree.Params:
    """The parameters of one member, as a run of its own would have them."""
    own = jax.tree.map(lambda differs, a: sweep.member(a, index) if differs else a, differs, frozen)
    return tree.combine(sweep.member(trained, index), own)


def each_summary(means: dict[str, Any], count: int) -> list[dict[str, float]]:
    """`evaluate.summary` of each member, from means [members]."""
    return [evaluate.summary(own) for own in each_mean(means, count)]


def each_mean(means: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The means of each member, from means [members]."""
    return [{name: values[index] for name, values in means.items()} for index in range(count)]


def answered(
    runs: Sequence[Member],
    prompts: Sequence[Prompt],
    base: Model,
    dtype: Any,
    how: Execution,
    frozen: tree.Params,
    differs: tree.Params,
) -> Each:
    """`answers.evaluator` of each member: their prompts are answered together, as rows with different adapters."""

    def evaluate(step: int, state: TrainState) -> list[dict[str, float]]:
        params = tree.combine(state.trainable, frozen)
        if any(isinstance(part, Slot) for part in params.values()):
            every = [alone(state.trainable, frozen, differs, index) for index in range(len(runs))]
            said = [
                answers.ask(m.config, tree.cast(p, dtype), prompts, base, how) for m, p in zip(runs, every, strict=True)
            ]
        else:
            stacked = tree.cast(many.wrap(*tree.partition(params, differs), len(runs)), dtype)
            named = [*range(len(runs) - 1), -1]  # the last of a stack is -1: `many.for_rows`
            ids = [member for member in named for _ in prompts]
            rows = answers.ask(runs[0].config, stacked, [*prompts] * len(runs), base, how, ids)
            said = [rows[index * len(prompts) : (index + 1) * len(prompts)] for index in range(len(runs))]
        return [
            answers.tell(member.config, member.folder, step, replies, base.tokenizer)
            for member, replies in zip(runs, said, strict=True)
        ]

    return evaluate
