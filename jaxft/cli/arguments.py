"""What the verbs' command lines share: `CONFIG.yaml key=value ...`, and help that lists the config's keys."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from jaxft import recipes
from jaxft.border.errors import ConfigError

N = TypeVar("N", int, float)


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


def numbers(flag: str, text: str, kind: type[N]) -> list[N]:
    """The numbers of `--flag 1,2,3`, all finite. Raises ConfigError."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        such = "integers such as 0,1,2" if kind is int else "numbers such as 0.7,0.3"
        raise ConfigError(f"{flag}: got {text!r}; expected {such}")
    return found


def refuse_below(flag: str, value: int | None, least: int) -> None:
    """Raises ConfigError for a flag's number that is too small."""
    if value is not None and value < least:
        raise ConfigError(f"{flag}: got {value}; expected at least {least}")


def refuse_twice(flag: str, values: Sequence[object]) -> None:
    """Raises ConfigError for a value that is there more than once."""
    twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if twice:
        raise ConfigError(f"{flag}: got {', '.join(map(str, twice))} more than once; expected each once")


class _Help(argparse.Action):
    """`--help`: usage and options, then every key of the config with its type, default and meaning (or those asked)."""

    def __call__(self, parser, namespace, values, option_string=None):
        asked = [str(value) for value in values or () if not str(value).endswith((".yaml", ".yml"))]
        if not asked:
            print(parser.format_help())
        if asked or parser.get_default("takes_config"):
            from jaxft.cli import keys  # imports every section: only when asked for

            root = parser.get_default("root") or keys.RunConfig
            keys.show(asked or parser.get_default("sections") or (), root=root)
        parser.exit()
