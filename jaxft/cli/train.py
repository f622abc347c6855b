"""`jaxft train CONFIG.yaml`: fine-tunes a model, from the config to an adapter or a model that others load.

With `--sweep` it is many runs at once (`sweep`).
"""

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxft import config as config_
from jaxft import run_dir
from jaxft.border import reading
from jaxft.border.errors import ConfigError
from jaxft.cli import answers, assemble, critic, forgetting, members, reward_models, rollouts, single, sweep
from jaxft.cli import arguments as arguments_
from jaxft.cli import job as job_
from jaxft.cli import others as others_
from jaxft.cli.job import Job, Material
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.data import sources
from jaxft.model import Model
from jaxft.sharding import mesh as mesh_
from jaxft.training import evaluate, loop, prefetch, step
from jaxft.training.evaluate import Evaluator
from jaxft.training.loop import Settings


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config, `--sweep`, `--resume` and `--dry-run`."""
    arguments_.add_config(parser)
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value,...",
        help="after all else: train all combinations of these values side by side, on one copy of the model: "
        "--sweep peft.rank=8,16 optim.lr=1e-4,3e-4 seed=0..3 (seed,data.seed=0..3: with an order of the data each)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run_dir (resume=true)")
    parser.add_argument("--dry-run", action="store_true", help="check the config, print all of it, and do nothing else")


def command(args: argparse.Namespace) -> int:
    """Trains (or, in a dry run, shows the whole config); returns the exit code."""
    file, overrides = arguments_.split(args.words)
    if file is not None and "stages" in reading.read(file).values:
        raise ConfigError(f"{file}: a pipeline of several runs; jaxft run {file} runs them")
    config = config_.load(file, [*overrides, *(["resume=true"] if args.resume else [])])
    if args.sweep:
        config = dataclasses.replace(config, sweep=tuple(args.sweep))
    runs = members.expand(config) if config.sweep else []
    if args.dry_run:
        print(config_.dump(config), end="")
        print("".join(f"# member {i}: {member.name}\n" for i, member in enumerate(runs, 1)), end="")
        return 0
    return run(config)


def run(config: RunConfig) -> int:
    """The whole run: 0 when it is complete, 1 when a member of a sweep failed, 130 or 143 when a signal ended it (the
    state is saved)."""
    console = Console(highlight=False)
    if not config.data.given:
        raise ConfigError("`data.path` must be given: a file or data set to train on, data.path=rows.jsonl")
    sources.check(config.data)
    others_.check(config)
    forgetting.check(config)
    rollouts.check(config)
    critic.check(config)
    config = rollouts.settled(config)
    run_dir.check(config)
    mesh = assemble.devices(config)
    base = assemble.model(config, mesh)
    read, make = job_.material, sweep.job if config.sweep else alone
    if rollouts.wanted(config):
        read, make = rollouts.material, rollouts.job
    material: Any = read(config, base)
    console.print(*material.train.report().lines(), sep="\n")
    job = make(config, base, material, mesh, console)
    del base  # the job holds of it what it needs, once

    folder, _ = run_dir.claim(config)
    with run_dir.held(folder) if jax.process_index() == 0 else contextlib.nullcontext():
        loader, evaluators = job.begin(folder)
        result = loop.fit(
            job.step,
            job.state,
            job.frozen,
            loader,
            folder,
            job.record,
            Settings(config.train, config.eval, config.checkpoint, config.log),
            steps=material.steps,
            place=mesh_.placer(mesh),
            evaluators=evaluators,
            averaged=job.optimizer.averaged,
            epoch_steps=material.train.batches_per_epoch,
            flops_per_token=job.flops,
            read=job.read,
            feed=job.feed,
        )
        if result.exit_code:
            console.print(f"Interrupted and saved. Go on: jaxft train {folder / run_dir.CONFIG} --resume")
            return result.exit_code
        trained = job.optimizer.averaged(result.state.opt_state, result.state.trainable)
        return job.finish(result, trained, folder)


def alone(config: RunConfig, base: Model, material: Material, mesh: Mesh | None, console: Console) -> Job:
    """A single run."""
    statistics = assemble.statistics(config, base, material.prepared, assemble.execution(config, mesh))
    rewards = reward_models.load(config, base, mesh)
    begun = single.begin(config, base, material.steps, mesh, console, statistics, rewards.params)
    base, first, models = begun.base, begun.first, begun.models
    assemble.check_tasks(first.trainable, material.prepared.train, material.prepared.held_out)
    asked = answers.chosen(config, material.prepared.held_out, material.prepared.asked, base)
    general = forgetting.examples(config, base, assemble.virtual(config).get("prompt", 0))
    beforehand = others_.Beforehand(config, base, begun.dtype, begun.how, console)
    student = rollouts.student(config, begun, rewards, console) if rollouts.mixes(config) else None

    objective, settings = assemble.objective(config, material.prepared.train), config.objective.value
    eval_step = step.make_eval_step(objective, settings, begun.score)
    if material.held_out is not None:
        batch = prefetch.split(others_.stand_in(config, material.train.batch(0)), config.train.accumulate)
        job_.refuse_metric(config, jax.eval_shape(eval_step, first.trainable, first.start, models, batch, first.carry))
    elif general is not None:
        job_.refuse_metric(config)

    def begin(folder: Path) -> tuple[Any, list[Evaluator]]:
        data = beforehand.material(material, tree.combine(first.trainable, begun.frozen), folder, begun.others)
        found = []
        if data.held_out is not None:
            place, accumulate = mesh_.placer(mesh), config.train.accumulate
            found += [evaluate.held_out(eval_step, models, data.held_out, place, config.eval, accumulate)]
        if general is not None:
            found += [forgetting.evaluator(config, general, base, begun.dtype, begun.how, begun.frozen)]
        if asked:
            found += [answers.evaluator(config, asked, base, begun.dtype, begun.how, begun.frozen, folder)]
        return data.train if student is None else student(data.train, folder), found

    shardings = job_.shardings(begun.places, models, mesh)
    run = step.make_step(objective, settings, begun.score, begun.optimizer, shardings, begun.hooks)
    finish = single.finisher(config, begun, console)
    rest = (begun.record, begun.optimizer, begun.flops, begin, finish)
    return Job(run, first, models, *rest, feed=prefetch.ahead if student is None else prefetch.as_asked)
