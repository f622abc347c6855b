"""`jaxft rank TARGET`: several answers to each prompt, which a person puts in order; the preferences go to a file that
`dpo` and `reward` train on.

A prompt that was decided is not asked again, so the same command goes on where it was left. Without a terminal the
orders are read from standard input, a line each.
"""

import argparse
import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from jaxft import run_dir
from jaxft.border.errors import ConfigError
from jaxft.cli import arguments as arguments_
from jaxft.cli import judgements, prompting, target
from jaxft.cli.judgements import Book
from jaxft.cli.prompting import Speaker
from jaxft.cli.target import Target
from jaxft.data import Prompt, questions
from jaxft.data import sources as sources_
from jaxft.data.records import Row
from jaxft.objectives import OBJECTIVES
from jaxft.rollout import generate, replies

HELP = "best first: 2 1 3   equally good: 2=1 3   s: skip   u: take the last one back   q: leave"
TRIES = 3
"""Seeds that are tried until two answers differ."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target, the prompts, how many answers, and the file."""
    target.add(parser, ("model", "data", "generate"))
    parser.add_argument("--n", type=int, default=4, metavar="N", help="answers to each prompt; default: 4")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt, instead of the data's")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts to ask at most; default: all of the data")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="default: preferences.jsonl, in the folder of a run"
    )


def command(args: argparse.Namespace) -> int:
    """Asks until the prompts or the answers end."""
    arguments_.refuse_below("--n", args.n, 2)
    arguments_.refuse_below("--limit", args.limit, 1)
    found = target.find(args.target, args.overrides)
    if found.config.generate.temperature == 0.0:
        raise ConfigError("generate.temperature: got 0, which gives the same answer every time; expected more, say 0.7")
    folder = Path(args.target) if (Path(args.target) / run_dir.CONFIG).is_file() else Path()
    with Book(args.out or folder / "preferences.jsonl") as book:
        speaker = prompting.load(found)
        asked = _prompts(found, speaker, args.prompt, args.limit)
        left = [prompt for prompt in asked if judgements.identity(prompt.given) not in book.done]
        if len(left) < len(asked):
            print(f"{len(asked) - len(left)} of {len(asked)} prompts are decided in {book.ranked}")
        if sys.stdin.isatty():
            import readline  # noqa: F401  (line editing and history for input())
        _ask(found, speaker, left, args.n, book)
        decided = sum(bool(record.get("order")) for record in book.done.values())
        print(f"{decided} prompts ranked, {book.preferences} preferences in {book.out}")
        if book.preferences:
            print(f"Next: jaxft train configs/dpo.yaml model.path={found.config.model.path} data.path={book.out}")
    return 0


def _ask(found: Target, speaker: Speaker, prompts: list[Prompt], count: int, book: Book) -> None:
    """Prompt by prompt; `u` goes back to the one that was decided before."""
    console, typed, at = Console(highlight=False), _lines(), 0
    console.print(HELP, markup=False, soft_wrap=True)
    while at < len(prompts):
        prompt = prompts[at]
        record = _answered(found, speaker, prompt, count)
        if len(record["answers"]) < 2:
            console.print(Text(f"{prompt.where}: no two different answers; left out", style="yellow"), soft_wrap=True)
            at += 1
            continue
        _show(console, prompt, record["answers"], f"{at + 1} of {len(prompts)}")
        decision = _decision(typed, len(record["answers"]), console)
        if decision == "quit":
            return
        if decision == "undo":
            before = book.undo()
            if before is None:
                console.print("nothing to take back")
            else:
                taken = judgements.identity(before["prompt"])
                at = next(i for i, each in enumerate(prompts) if judgements.identity(each.given) == taken)
            continue
        book.add({**record, "order": decision} if isinstance(decision, list) else {**record, "skipped": True})
        at += 1


def _decision(typed: Iterator[str], count: int, console: Console) -> judgements.Order | str:
    """An order, or "skip", "undo", "quit" (which the end of the input is too); asked for until it is one of them."""
    for line in typed:
        for word in ("skip", "undo", "quit"):
            if line.lower() in (word, word[0]):
                return word
        try:
            return judgements.order(line, count)
        except ValueError as error:
            console.print(f"{error}\n{HELP}", markup=False, soft_wrap=True)
    return "quit"


def _lines() -> Iterator[str]:
    """What is typed, or piped in; empty lines count for nothing."""
    while True:
        try:
            line = input("rank> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _answered(found: Target, speaker: Speaker, prompt: Prompt, count: int) -> dict[str, Any]:
    """The prompt with answers that differ, in an order that says nothing of how they came about."""
    settings, seed = found.config.generate, int(judgements.identity(prompt.given)[:7], 16)
    answers: dict[str, dict[str, Any]] = {}
    tasks = [prompt.task] if prompt.task else None
    for turn in range(TRIES):
        own = dataclasses.replace(settings, seed=(settings.seed + seed + turn) % 2**31, batch=count)
        made = generate.generate(
            speaker.model.config, speaker.params, [prompt.tokens], own, speaker.end,
            tasks=tasks, samples=count, tokenizer=speaker.tokenizer,
        )  # fmt: skip
        for completion in made:
            text = replies.spoken(speaker.tokenizer, completion.tokens, speaker.end, settings.stop)
            if text.strip() and len(answers) < count:
                answers.setdefault(text.strip(), {"text": text, "finished": completion.finished})
        if len(answers) > 1:
            break
    shown = list(answers.values())
    random.Random(seed).shuffle(shown)
    about = {"model": found.config.model.path, "adapter": None if found.adapter is None else str(found.adapter)}
    how = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return {"prompt": prompt.given, **tools, "answers": shown, **about, **how, "seed": settings.seed}


def _show(console: Console, prompt: Prompt, answers: list[dict[str, Any]], place: str) -> None:
    """The prompt, and the answers by number."""
    given = prompt.given
    said = given if isinstance(given, str) else "\n".join(f"{each['role']}: {each['content']}" for each in given)
    console.print(Panel(Text(said), title=place, title_align="left", border_style="cyan"))
    for number, answer in enumerate(answers, 1):
        title = f"{number}" if answer["finished"] else f"{number} (cut at generate.max_new_tokens)"
        console.print(Panel(Text(answer["text"].strip()), title=title, title_align="left"))


def _prompts(found: Target, speaker: Speaker, texts: list[str], limit: int | None) -> list[Prompt]:
    """Those of the command line, else of the data, each once. Raises ConfigError if there are none."""
    config = found.config.data
    if texts:
        given = [[{"role": "user", "content": text}] if speaker.render else text for text in texts]
        rows = [Row({"prompt": each}, f"--prompt {i}") for i, each in enumerate(given, 1)]
        every = questions.prompts(rows, "", config, speaker.tokenizer)
    elif config.given:
        settings = [sources_.alone(config, name) for name in config.sources] or [config]
        wanted = OBJECTIVES[found.config.objective.name].rows
        parts = [(*questions.rows_of(each, wanted, limit), each) for each in settings]
        every = [prompt for part in parts for prompt in questions.prompts(*part, speaker.tokenizer)]
    else:
        raise ConfigError("no prompt; say data.path=rows.jsonl (rows with a `prompt`, or any others), or --prompt TEXT")
    once = {judgements.identity(prompt.given): prompt for prompt in reversed(every)}
    return [*reversed(once.values())][:limit]
