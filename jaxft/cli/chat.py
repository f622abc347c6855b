"""`jaxft chat TARGET`: a conversation in the terminal; replies appear token by token."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator

from jaxft.cli import prompting, target
from jaxft.cli.prompting import Message, Speaker
from jaxft.rollout import generate, replies
from jaxft.rollout.generate import GenerateConfig

HELP = "/reset: forget the conversation   /system TEXT: set the system message   /quit, or Ctrl-D: leave"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target and the system message."""
    target.add(parser, ("model", "generate"))
    parser.add_argument("--system", metavar="TEXT", default="", help="system message")


def command(args: argparse.Namespace) -> int:
    """Reads, answers, until the input ends."""
    found = target.find(args.target, args.overrides)
    speaker = prompting.load(found)
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{args.target}\n{HELP}")
        import readline  # noqa: F401  (line editing and history for input())
    if speaker.render is None:
        print("This model has no chat template: texts are continued as they are.", file=sys.stderr)
    system, messages, turn = args.system, list[Message](), 0
    for line in _lines("\nyou> " if terminal else ""):
        word, _, rest = line.partition(" ")
        if word == "/quit":
            break
        if word in ("/reset", "/system"):
            messages, system = [], rest if word == "/system" else system
        elif line.startswith("/"):
            print(HELP)
        else:
            messages.append({"role": "user", "content": line})
            prompt = [{"role": "system", "content": system}, *messages] if system else messages
            settings = dataclasses.replace(found.config.generate, seed=found.config.generate.seed + turn)
            messages.append({"role": "assistant", "content": _say(speaker, prompt, settings)})
            turn += 1
    return 0


def _lines(question: str) -> Iterator[str]:
    """Lines that are not empty, until the input ends."""
    while True:
        try:
            line = input(question).strip()
        except EOFError:
            return
        if line:
            yield line


def _say(speaker: Speaker, messages: list[Message], settings: GenerateConfig) -> str:
    """Prints a reply as it is made, and returns it. Ctrl-C ends the reply, not the conversation."""
    said = ""
    try:
        for piece in pieces(speaker, messages, settings):
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print(flush=True)
    return said


def pieces(speaker: Speaker, messages: list[Message], settings: GenerateConfig) -> Iterator[str]:
    """The reply's text in pieces, each as soon as its characters are whole."""
    tokens, said = list[int](), ""
    prompt = speaker.chat(messages)
    given = (speaker.model.config, speaker.params, prompt, settings, speaker.end)
    for token in generate.stream(*given, tokenizer=speaker.tokenizer):
        if token in speaker.end:
            break
        tokens.append(token)
        text = replies.spoken(speaker.tokenizer, tokens, speaker.end, settings.stop)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens is not all there yet
            yield text[len(said) :]
            said = text
