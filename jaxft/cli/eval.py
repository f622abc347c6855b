"""`jaxft eval TARGET`: loss, perplexity and token accuracy on held-out data, and exact match of greedy replies.

The data are the config's held-out part; where it has none, or `data.path` is given on the command line, all of
`data.path`.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jaxft import data, peft
from jaxft.border.errors import ConfigError
from jaxft.cli import answers, assemble, forgetting, heads, judging, precision, rollouts, summary, target
from jaxft.cli import others as others_
from jaxft.cli.target import Target
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.data import DataConfig, Examples, Loader
from jaxft.data import examples as examples_
from jaxft.data.records import Row
from jaxft.data.retold import Retold
from jaxft.model import Model
from jaxft.models import slots
from jaxft.models.decoder import Execution
from jaxft.objectives import OBJECTIVES, calibration
from jaxft.rollout import replies
from jaxft.rollout.replies import Reply
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.training import evaluate, step
from jaxft.training.state import TrainState


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target and how much to answer."""
    target.add(parser, ("model", "data", "objective", "train", "eval", "generate", "mesh"))
    parser.add_argument(
        "--limit", type=int, metavar="N", help="prompts to answer for exact match; default: all, 0: none"
    )
    parser.add_argument(
        "--shots",
        type=int,
        default=0,
        metavar="K",
        help="show K rows of data.path with their answers before each prompt",
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="replies to show; default: 3")
    parser.add_argument(
        "--products",
        action="store_true",
        help="show the error of every layer's products in few bits (quant.method) against the model as it was",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--replies", type=Path, metavar="FILE", help="write every prompt, reply and answer there, as jsonl"
    )


def command(args: argparse.Namespace) -> int:
    """Measures and prints."""
    found = target.find(args.target, _other_data(args.overrides))
    config = found.config
    if not config.data.given and config.data.eval_path is None:
        raise ConfigError("say on which data: data.path=rows.jsonl")
    mesh = assemble.devices(config)
    model, params = target.load(found, mesh)
    heads.refuse_scorer(config, model)
    how = assemble.execution(dataclasses.replace(config, train=dataclasses.replace(config.train, unroll="never")), mesh)
    if rollouts.wanted(config):
        return _on_prompts(args, config, model, params, how)
    examples, form, source = held_out(
        config.data, model, OBJECTIVES[config.objective.name].rows, slots.prompt_length(params)
    )
    measured = losses(found, model, params, examples, how)
    values = evaluate.summary(measured) | forgetting.measured(config, model, params, how)
    table = reliability(measured)
    said = _replies(found, model, params, examples, form, how, args.limit, args.shots)
    values |= answers.exact(said)
    if args.replies is not None:
        answers.write(args.replies, 0, said, model.tokenizer)
    products = precision.products(found, examples, how) if args.products else []
    if args.json:
        told: dict[str, Any] = {"products": {row.module: row.error for row in products}} if products else {}
        told |= {"reliability": table} if table else {}
        print(json.dumps({"data": source, "examples": len(examples), "replies": len(said), **values, **told}))
    else:
        _show(source, examples, values, said, args.samples)
        _show_reliability(table)
    if products and not args.json:
        precision.show_products(products)
    return 0


def _on_prompts(args: argparse.Namespace, config: RunConfig, model: Model, params: tree.Params, how: Execution) -> int:
    """Measures a policy that has learnt from its own completions: its rewards and exact match, on prompts."""
    for flag, given in (("--shots", args.shots), ("--products", args.products)):
        if given:
            raise ConfigError(f"{flag}: objective {config.objective.name} has prompts alone; leave it out")
    rollouts.check(config)
    console = Console(highlight=False, stderr=args.json)
    source, said, values = judging.measured(config, model, params, how, args.limit, console)
    values |= forgetting.measured(config, model, params, how)
    if args.replies is not None:
        answers.write(args.replies, 0, said, model.tokenizer)
    if args.json:
        print(json.dumps({"data": source, "examples": len(said), "replies": len(said), **values}))
    else:
        _show(source, said, values, said, args.samples)
    return 0


def _other_data(overrides: list[str]) -> list[str]:
    """With `data.path` given, what the config held out of other data is meant no more, nor are its sources."""
    keys = {word.partition("=")[0] for word in overrides}
    if keys & {"data.path", "data.eval_path"}:
        overrides = ["data.sources={}", "data.mix={}", *overrides]
    if "data.path" not in keys or any(key.startswith("data.eval_") for key in keys):
        return overrides
    return [*overrides, "data.eval_path=null", "data.eval_split=null", "data.eval_fraction=0", "data.eval_examples=0"]


def held_out(config: DataConfig, model: Model, rows: str = "tokens", reserved: int = 0) -> tuple[Examples, str, str]:
    """The held-out examples (all of `data.path` where nothing is held out), their format, and what to call them.

    ``rows``, ``reserved``: see `data.prepare`."""
    if config.eval_path is not None or config.eval_split is not None:
        path, split = config.eval_path or config.path, config.eval_split or config.split
        alone = dataclasses.replace(config, path=path, split=split, eval_path=None, eval_split=None, limit=None)
        prepared = data.prepare(alone, model.tokenizer, rows, reserved)
        return prepared.train, prepared.format, f"{path}" + (f" ({split})" if config.eval_split else "")
    prepared = data.prepare(config, model.tokenizer, rows, reserved)
    if prepared.held_out is not None and len(prepared.held_out):
        return prepared.held_out, prepared.format, f"the part held out of {config.path or ', '.join(config.sources)}"
    return prepared.train, prepared.format, str(config.path or ", ".join(config.sources))


def start(found: Target, model: Model, mesh: Mesh | None) -> tree.Params:
    """The policy as its run began; of what no run made, the model without the adapter. ``model``: that of ``found``."""
    begun = found.begun
    if begun is None:
        return model.params
    if (begun.model, begun.quant) != (found.config.model, found.config.quant):
        model, _ = target.load(Target(begun, None), mesh)
    if any(peft.method_of(choice.value).calibrate(choice.value) for choice in begun.peft):
        return model.params  # which such a method begins at, whatever the data that it began from
    params, *_ = assemble.adapted(begun, model)
    return params if mesh is None else jax.device_put(params, rules.shardings(params, mesh))


def losses(found: Target, model: Model, params: tree.Params, examples: Examples, how: Execution) -> dict[str, Any]:
    """The objective's terms, metrics and tables, for `evaluate.summary`: means over all target tokens, pairs or steps.
    The reference, where there is one, and the start are the policy as its run began (`start`), unless another is
    named."""
    config = forgetting.anywhere(others_.live(found.config), examples)
    objective, chosen = assemble.objective(config, examples), config.objective.value
    asked = objective.asked(chosen)
    others = others_.load(config, model, how.mesh)
    eval_step = step.make_eval_step(objective, chosen, others_.scorer(config, model, how, others))
    if views := {"reference", "start"} & {*asked.views} - {*others}:
        others |= dict.fromkeys(views, dataclasses.replace(model, params=start(found, model, how.mesh)))
    settings = dataclasses.replace(config.data, shuffle=False)
    assemble.check_tasks(params, examples)
    reserved, retold = slots.prompt_length(params), None
    if others_.retells(config):
        retold = Retold(held_out(config.data, others["teacher"])[0])
    batches = functools.partial(
        Loader, examples.once(), settings, batch_rows=config.train.batch, epochs=1, reserved=reserved,
        mismatched="kl" in asked.asides, share=config.data.share_prompts, beside=retold,
    )  # fmt: skip
    frozen = step.Models(jax.tree.map(lambda leaf: None, params), others_.handed_over(others, False))
    measured = evaluate.measure(eval_step, frozen, batches, mesh_.placer(how.mesh), config.eval)
    begun = TrainState(jnp.int32(0), params, None, None, objective.carry(chosen), None, jax.random.key(0))
    return measured(begun)


def reliability(measured: Mapping[str, Any]) -> list[dict[str, float]]:
    """The reliability table, a row for each bin that something falls in; empty for an objective that has none."""
    if calibration.SHARE not in measured:
        return []
    rows = zip(*(measured[name] for name in calibration.TABLE), strict=True)
    names = [name.rpartition("/")[2] for name in calibration.TABLE]
    return [dict(zip(names, map(float, row), strict=True)) for row in rows if row[0] > 0]


def _replies(
    found: Target,
    model: Model,
    params: tree.Params,
    examples: Examples,
    form: str,
    how: Execution,
    limit: int | None,
    shots: int,
) -> list[Reply]:
    """Greedy replies to the data's prompts; none where the data are plain text, or the model scores."""
    config = found.config
    if model.config.labels:
        return []
    shown = _shots(config.data, shots)
    prompts = [] if limit == 0 else data.prompts_of(examples, form, config.data, model.tokenizer, limit, shown)
    greedy = dataclasses.replace(config.generate, temperature=0.0)
    end = answers.ends(config, model)
    return replies.replies(model.config, params, prompts, model.tokenizer, greedy, end, execution=how)


def _shots(config: DataConfig, count: int) -> list[Row]:
    """The first rows of the training data, to be shown with their answers. Raises ConfigError if there are none."""
    if count == 0:
        return []
    if config.eval_path is None and config.eval_split is None:
        raise ConfigError("--shots takes rows of data.path, which is evaluated itself; name other rows: data.eval_path")
    if config.sources:
        raise ConfigError("--shots takes rows of data.path, and there are several sources; name one: data.path")
    source = examples_.read(dataclasses.replace(config, limit=count))
    found = data.opened(source, config.path, config)[0].rows(0, count)
    return [row for row in found if isinstance(row, Row)]


def _show(
    source: str, examples: Examples | list[Reply], values: dict[str, float], said: list[Reply], samples: int
) -> None:
    console = Console(highlight=False, markup=False)
    table = Table(title=f"{source}: {len(examples):,} examples", title_justify="left", show_header=False)
    for name, value in values.items():
        share = name.endswith(summary.SHARES)
        counted = f" of {len(said):,} replies" if name == "exact_match" else ""
        table.add_row(name.replace("_", " "), (f"{value:.1%}" if share else f"{value:.4g}") + counted)
    console.print(table)
    if said and samples:
        shown = Table("prompt", "reply", "answer of the data", "exact", show_lines=True)
        for reply in said[:samples]:
            shown.add_row(reply.prompt.text.strip(), reply.text, reply.prompt.answer, "yes" if reply.exact else "no")
        console.print(shown)


def _show_reliability(rows: list[dict[str, float]]) -> None:
    """How often what was said with a probability was so."""
    if rows:
        table = Table(
            "share", "predicted", "observed", title="how reliable its probabilities are", title_justify="left"
        )
        for row in rows:
            table.add_row(*(f"{value:.1%}" for value in row.values()))
        Console(highlight=False, markup=False).print(table)
