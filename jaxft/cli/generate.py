"""`jaxft generate TARGET --prompt TEXT`: answers to prompts, from the command line, a file or standard input."""

import argparse
import json
import sys
from pathlib import Path

from jaxft.border.errors import ConfigError
from jaxft.cli import prompting, target
from jaxft.rollout import generate, replies


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target and the prompts."""
    target.add(parser, ("model", "generate"))
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given again")
    parser.add_argument("--file", type=Path, help="prompts, one a line; without it and --prompt: standard input")
    parser.add_argument("--system", metavar="TEXT", help="system message before each prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")


def command(args: argparse.Namespace) -> int:
    """Generates and prints."""
    prompts = _prompts(args)
    found = target.find(args.target, args.overrides)
    speaker = prompting.load(found)
    system = [{"role": "system", "content": args.system}] if args.system else []
    rows = [
        speaker.raw(prompt) if args.raw else speaker.chat([*system, {"role": "user", "content": prompt}])
        for prompt in prompts
    ]
    settings = found.config.generate
    given = (speaker.model.config, speaker.params, rows, settings, speaker.end)
    made = generate.generate(*given, tokenizer=speaker.tokenizer)
    for prompt, completion in zip(prompts, made, strict=True):
        text = replies.spoken(speaker.tokenizer, completion.tokens, speaker.end, settings.stop)
        if args.json:
            print(
                json.dumps({"prompt": prompt, "completion": text, "finished": completion.finished}, ensure_ascii=False)
            )
        else:
            print(f"> {prompt}\n{text}\n" if len(prompts) > 1 else text)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.file is not None:
        args.prompt += args.file.read_text(encoding="utf-8").splitlines()
    elif not args.prompt:
        if sys.stdin.isatty():
            raise ConfigError("no prompt; say --prompt TEXT, --file FILE, or pipe prompts in, one a line")
        args.prompt += sys.stdin.read().splitlines()
    prompts = [prompt for prompt in args.prompt if prompt.strip()]
    if not prompts:
        raise ConfigError("the prompts are empty")
    return prompts
