"""What the verbs' command lines share: `CONFIG.yaml key=value ...`, and help that lists the config's keys."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxft import recipes


def parser(verb: str, doc: str) -> argparse.ArgumentParser:
    """A verb's parser, with the options every verb has."""
    made = argparse.ArgumentParser(f"jaxft {verb}", description=f"{doc}.", allow_abbrev=False, add_help=False)
    made.add_argument(
        "-h",
        "--help",
        action=_Help,
        nargs="*",
        metavar="KEY",
        help="show this; of `peft` or `peft=lora` the keys alone",
    )
    made.add_argument("--traceback", action="store_true", help="on an error, show where in the code it came from")
    return made


def add_config(parser: argparse.ArgumentParser, sections: Sequence[str] = ()) -> None:
    """Adds `[CONFIG.yaml] [key=value ...]`; `--help` lists the keys of these sections (none named: of all)."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml key=value",
        help="a config file, or the name of a shipped one, and the keys that differ from it; values are YAML: "
        "optim.lr=1e-4 'peft.targets=[q_proj, v_proj]' run_dir=runs/first",
    )
    parser.set_defaults(takes_config=True, sections=tuple(sections))


def split(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The config file, if one is named, and the overrides: what `config.load` takes. Raises ConfigError."""
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return recipes.find(words[0]), list(words[1:])
    return None, list(words)


class _Help(argparse.Action):
    """`--help`: usage and options, then every key of the config with its type, default and meaning (or those asked)."""

    def __call__(self, parser, namespace, values, option_string=None):
        asked = [str(value) for value in values or () if not str(value).endswith((".yaml", ".yml"))]
        if not asked:
            print(parser.format_help())
        if asked or parser.get_default("takes_config"):
            from jaxft.cli import keys  # imports every section: only when asked for

            keys.show(asked or parser.get_default("sections") or ())
        parser.exit()
