"""`jaxft data CONFIG.yaml`: the exact tokens a model will see, which of them it learns, and how long examples are."""

import argparse
from typing import Any

from rich.console import Console

from jaxft import config, data, vocabulary
from jaxft.checkpoint import hub, tokenizer
from jaxft.checkpoint.errors import CheckpointError
from jaxft.cli import arguments as arguments_
from jaxft.cli import assemble, judging, rollouts
from jaxft.config import RunConfig
from jaxft.data import questions
from jaxft.objectives import OBJECTIVES


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and how much to show."""
    arguments_.add_config(parser, ("model", "data", "objective"))
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows to show token by token; default: 2")


def command(args: argparse.Namespace) -> int:
    """Prints the preview and the report."""
    wanted = config.load(*arguments_.split(args.words))
    directory = hub.directory(wanted.model.path, wanted.model.revision, weights=False)
    found = tokenizer.load(directory)
    if found is None:
        raise CheckpointError(directory, "no tokenizer", "a tokenizer beside the model", "Give a folder that has one.")
    vocabulary.add(found, wanted.model.new_tokens)
    if rollouts.wanted(wanted):
        return _prompts(wanted, found, args.rows)
    reserved = assemble.virtual(wanted).get("prompt", 0)
    form = OBJECTIVES[wanted.objective.name].rows
    data.preview(wanted.data, found, Console(), rows=args.rows, reserved=reserved, form=form)
    return 0


def _prompts(wanted: RunConfig, found: Any, rows: int) -> int:
    """Of prompts to be answered: each as the model sees it, and its columns."""
    data.install(found, wanted.data.template)
    asked, console = questions.prepare(wanted.data, found, judging.room(wanted)), Console(highlight=False, markup=False)
    for prompt in asked.train[:rows]:
        console.print(f"{prompt.where}: {len(prompt.tokens)} tokens\n{prompt.text}")
        for name, value in prompt.columns.items():
            console.print(f"  {name}: {value}")
    console.print(*rollouts.Asking(asked, wanted).lines(), sep="\n")
    return 0
