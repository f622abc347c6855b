"""`jaxft train CONFIG.yaml`: fine-tunes a model, from the config to an adapter or a model that others load."""

import argparse
import dataclasses
from pathlib import Path

import jax
from rich.console import Console

from jaxft import config as config_
from jaxft import data, run_dir
from jaxft import model as model_
from jaxft.border import check
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import state as disk
from jaxft.cli import answers, assemble, summary, target
from jaxft.cli import arguments as arguments_
from jaxft.cli.assemble import Split
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.model import Model
from jaxft.objectives import OBJECTIVES
from jaxft.objectives.terms import Means
from jaxft.peft import store
from jaxft.sharding import mesh as mesh_
from jaxft.training import evaluate, loop, prefetch, step
from jaxft.training.loop import Settings


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config, `--resume` and `--dry-run`."""
    arguments_.add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run_dir (resume=true)")
    parser.add_argument("--dry-run", action="store_true", help="check the config, print all of it, and do nothing else")


def command(args: argparse.Namespace) -> int:
    """Trains (or, in a dry run, shows the whole config); returns the exit code."""
    file, overrides = arguments_.split(args.words)
    config = config_.load(file, [*overrides, *(["resume=true"] if args.resume else [])])
    if args.dry_run:
        print(config_.dump(config), end="")
        return 0
    return run(config)


def run(config: RunConfig) -> int:
    """The whole run: 0 when it is complete, 130 or 143 when a signal ended it (the state is saved)."""
    console = Console(highlight=False)
    if not config.data.path:
        raise ConfigError("`data.path` must be given: a file or data set to train on, data.path=rows.jsonl")
    run_dir.check(config)
    mesh = assemble.devices(config)
    base = assemble.model(config, mesh)
    prepared = data.prepare(config.data, base.tokenizer)
    train, held_out = assemble.loaders(config, prepared)
    console.print(*train.report().lines(), sep="\n")

    how = assemble.execution(config, mesh)
    parts = assemble.split(config, base, mesh, assemble.statistics(config, base, prepared, how))
    assemble.check_tasks(parts.trainable, prepared.train, prepared.held_out)
    steps = loop.total_steps(config.train, train.batches_per_epoch)
    hooks = assemble.hooks(config, parts, steps)
    optimizer, first, places = assemble.start(config, parts, steps, mesh, hooks)
    counted = f"{tree.count(parts.trainable):,} of {tree.count(parts.trainable) + tree.count(parts.frozen):,}"
    console.print(
        f"training {counted} parameters for {steps:,} steps with {' + '.join(choice.name for choice in config.peft)}"
    )
    record = disk.Record(check.plain(config), disk.identity(parts.frozen))
    flops = assemble.flops_per_token(config, base, parts)
    score = assemble.scorer(config, base, how)
    dtype = base.params["embed"]["tokens"].dtype
    asked = answers.chosen(config, prepared.held_out, prepared.format, base)
    base, frozen = _handed_over(base, parts, how.unroll)
    changed = parts.changed
    del parts  # the state holds its own copy of what is trained

    objective, settings = OBJECTIVES[config.objective.name], config.objective.value
    place = mesh_.placer(mesh)
    shardings = (
        None if places is None or mesh is None else step.Shardings(places, _of(frozen), mesh_.batch_sharding(mesh))
    )
    eval_step = step.make_eval_step(objective, settings, score)
    if held_out is not None:
        batch = prefetch.split(train.batch(0), config.train.accumulate)
        _refuse_metric(config, jax.eval_shape(eval_step, first.trainable, first.start, frozen, batch))
    folder, _ = run_dir.claim(config)
    evaluators = []
    if held_out is not None:
        evaluators += [evaluate.held_out(eval_step, frozen, held_out, place, config.eval, config.train.accumulate)]
    if asked:
        evaluators += [answers.evaluator(config, asked, base, dtype, how, frozen, folder)]
    result = loop.fit(
        step.make_step(objective, settings, score, optimizer, shardings, hooks),
        first,
        frozen,
        train,
        folder,
        record,
        Settings(config.train, config.eval, config.checkpoint, config.log),
        steps=steps,
        place=place,
        evaluators=evaluators,
        averaged=optimizer.averaged,
        epoch_steps=train.batches_per_epoch,
        flops_per_token=flops,
    )
    if result.exit_code:
        console.print(f"Interrupted and saved. Go on: jaxft train {folder / run_dir.CONFIG} --resume")
        return result.exit_code
    trained = optimizer.averaged(result.state.opt_state, result.state.trainable)
    written = _write(config, base, tree.combine(trained, frozen), changed, str(dtype), folder)
    summary.show(console, config, result, folder, written)
    return 0


def _refuse_metric(config: RunConfig, sums: Means) -> None:
    """Raises ConfigError for an `eval.metric` that this run will not evaluate: before the first step, not after it."""
    names = {*evaluate.summary(dict.fromkeys(sums, 0.0)), *(["exact_match"] if config.eval.exact_match else [])}
    if config.eval.metric not in names:
        raise ConfigError(f"`eval.metric`: got {config.eval.metric!r}; this run evaluates {', '.join(sorted(names))}")


def _of(frozen: tree.Params) -> tree.Params:
    return jax.tree.map(lambda a: a.sharding, frozen)


def _handed_over(base: Model, parts: Split, unroll: bool) -> tuple[Model, tree.Params]:
    """The frozen arrays as the step wants them, and the model without any of its own: they exist once."""
    some = any(map(tree.is_split, jax.tree.leaves(parts.trainable, is_leaf=tree.is_split)))  # only some layers train
    frozen = tree.split_layers(parts.frozen, donate=True) if unroll or some else parts.frozen
    return dataclasses.replace(base, params=None), frozen


def _write(config: RunConfig, base: Model, params: tree.Params, changed: set[str], dtype: str, folder: Path) -> Path:
    """The adapter, or the whole model where only arrays of its own were trained; an earlier one is replaced."""
    if tree.adapters(params):
        out = folder / target.ADAPTER
        store.save(
            params,
            base.names,
            base.config.num_layers,
            out,
            methods=[choice.value for choice in config.peft],
            changed=changed,
            base_model_name_or_path=base.source if config.model.init == "pretrained" else None,
            overwrite=out.exists(),
        )
        base.tokenizer.save_pretrained(out)
        return out
    out = folder / target.WHOLE
    model_.save_hf(base, params, out, dtype=dtype, overwrite=out.exists())
    return out
