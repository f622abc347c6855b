"""`jaxft schema`: a JSON schema of the config, for completion and checks in an editor."""

import argparse
import json
from pathlib import Path

from jaxft import config


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an optional file to write."""
    parser.add_argument("file", nargs="?", type=Path, help="where to write it; default: standard output")


def command(args: argparse.Namespace) -> int:
    """Prints or writes the schema."""
    text = json.dumps(config.schema(), indent=2) + "\n"
    if args.file is None:
        print(text, end="")
        return 0
    args.file.write_text(text, encoding="utf-8")
    print(f"Wrote {args.file}. Put this line at the top of a config, with the path from that config:")
    print(f"# yaml-language-server: $schema={args.file}")
    return 0
