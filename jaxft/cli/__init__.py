"""The command line: `jaxft <verb> CONFIG.yaml key=value ...`. Each verb is a thin file: parse, config, calls.

`VERBS` is the literal table. A verb's module is imported only when it is used, so `jaxft --help` is instant. A verb
has `arguments(parser)` and `command(args) -> int`.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

import jaxft
from jaxft.cli import arguments, failures

# verb -> (module, what it does)
VERBS: dict[str, tuple[str, str]] = {
    "train": ("jaxft.cli.train", "Fine-tune a model"),
    "run": ("jaxft.cli.run", "Run the stages of a pipeline, each on the model of the one before"),
    "teach": ("jaxft.cli.teach", "Let a teacher answer prompts, and keep what a verifier passes to train on"),
    "critique": ("jaxft.cli.critique", "Let a judge criticise and revise replies by a constitution, to train on"),
    "judge": ("jaxft.cli.judge", "Let a judge compare replies by a constitution, and write preferences to train on"),
    "generate": ("jaxft.cli.generate", "Answer prompts"),
    "chat": ("jaxft.cli.chat", "Talk with a model in the terminal"),
    "rank": ("jaxft.cli.rank", "Let a person put answers in order, and write preferences to train on"),
    "samples": ("jaxft.cli.samples", "Show what a policy wrote in its rollouts, with rewards and advantages"),
    "eval": ("jaxft.cli.eval", "Measure loss, perplexity and exact match on held-out data"),
    "compare": ("jaxft.cli.compare", "Train many methods on one task at one size, and rank them"),
    "quantize": ("jaxft.cli.quantize", "Store a model in four bits"),
    "merge": ("jaxft.cli.merge", "Work an adapter into its model's weights"),
    "combine": ("jaxft.cli.combine", "Make one adapter of several on the same base"),
    "inspect": ("jaxft.cli.inspect", "Tell what is in an adapter, without its model"),
    "export": ("jaxft.cli.export", "Write a model or adapter for others to load, or push it to the hub"),
    "data": ("jaxft.cli.data", "Show the exact tokens, which of them are learnt, and length statistics"),
    "recipes": ("jaxft.cli.recipes", "List the shipped configs, or print one"),
    "schema": ("jaxft.cli.schema", "Write a JSON schema of the config, for editors"),
    "env": ("jaxft.cli.env", "Show versions, devices and what this machine can run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. 0: done; 1: it failed; 2: the command or the config is wrong; 130: interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        print(f"jaxft {jaxft.__version__}")
        return 0
    if words[0] not in VERBS:
        near = difflib.get_close_matches(words[0], VERBS, 1)
        meant = f"; did you mean {near[0]}?" if near else "."
        print(f"jaxft: no verb {words[0]!r}{meant} The verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return _run(words[0], words[1:])


def _run(verb: str, words: list[str]) -> int:
    module, doc = VERBS[verb]
    with failures.told(verb, traceback="--traceback" in words) as outcome:
        command = importlib.import_module(module)
        parser = arguments.parser(verb, doc)
        command.arguments(parser)
        outcome.code = command.command(parser.parse_intermixed_args(words))
    return outcome.code


def overview() -> str:
    """What `jaxft --help` prints."""
    verbs = "\n".join(f"  {verb:<10}{doc}" for verb, (_, doc) in VERBS.items())
    return (
        "Fine-tune language models in JAX on TPUs and GPUs.\n\n"
        f"usage: jaxft VERB [CONFIG.yaml] [key=value ...]\n\n{verbs}\n\n"
        "`jaxft VERB --help` tells more."
    )
