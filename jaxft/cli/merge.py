"""`jaxft merge TARGET OUT`: the adapter worked into the weights; a model that `transformers` loads."""

import argparse
from pathlib import Path

from jaxft import model as model_
from jaxft.cli import target
from jaxft.core import tree


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target and where to write."""
    target.add(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--dtype", help="of the written weights: float32, bfloat16, float16; default: as loaded")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file; default: 5GB")


def command(args: argparse.Namespace) -> int:
    """Loads, merges, writes."""
    model, params = target.load(target.find(args.target, args.overrides))
    folder = model_.save_hf(model, tree.merge(params), args.out, dtype=args.dtype, max_shard_size=args.max_shard_size)
    print(f"Wrote {folder}. Load it with AutoModelForCausalLM.from_pretrained({str(args.out)!r}).")
    return 0
