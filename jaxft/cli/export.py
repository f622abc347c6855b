"""`jaxft export TARGET --out FOLDER`, or `--push-to-hub ORG/NAME`: the merged model, or with `--adapter` that alone.

A push is the same folder, uploaded; nothing is written to the hub unless all of it was written here first.
"""

import argparse
import tempfile
from pathlib import Path

from jaxft import model as model_
from jaxft.border.errors import ConfigError
from jaxft.cli import push, target
from jaxft.core import tree


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target, where to write, and what."""
    target.add(parser)
    parser.add_argument("--out", type=Path, help="folder to write; must be new or empty")
    parser.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="upload to this Hugging Face repository, made if needed"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument(
        "--adapter", action="store_true", help="the adapter alone, not merged; in peft's format where that can hold it"
    )
    parser.add_argument("--dtype", help="of the written weights: float32, bfloat16, float16; default: as loaded")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file; default: 5GB")


def command(args: argparse.Namespace) -> int:
    """Writes, and uploads if asked."""
    if args.out is None and args.push_to_hub is None:
        raise ConfigError("say where to: --out FOLDER, --push-to-hub ORG/NAME, or both")
    if args.push_to_hub:
        push.check(args.push_to_hub)  # before minutes of work
    found = target.find(args.target, args.overrides)
    if args.adapter and found.adapter is None:
        raise ConfigError(f"{args.target} has no adapter; leave --adapter out to export the model")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch) / "export"
        written = _write(found, folder, args)
        if args.out is not None:
            print(f"Wrote {written}")
        if args.push_to_hub:
            print(f"Uploaded to {push.folder(written, args.push_to_hub, args.private)}")
    return 0


def _write(found: target.Target, folder: Path, args: argparse.Namespace) -> Path:
    model, params = target.load(found)
    if args.adapter:
        return model_.save_adapter(model, params, folder)
    return model_.save_hf(model, tree.merge(params), folder, dtype=args.dtype, max_shard_size=args.max_shard_size)
