"""`jaxft merge TARGET OUT`: the adapter worked into the weights; a model that `transformers` loads.

An adapter of a base in few bits is merged into the dense matrices that these stand for, which is exact but for the
rounding to the written dtype. What that costs, and what storing the result in few bits again would, is told; `--packed`
does the latter.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxft import model as model_
from jaxft.cli import precision, target
from jaxft.core import tree
from jaxft.quant import errors
from jaxft.sharding import mesh as mesh_

REPORT = "merge_errors.json"
"""File beside the merged weights: each layer's error, where the base was in few bits."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target and where to write."""
    target.add(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--dtype", help="of the written weights: float32, bfloat16, float16; default: as loaded")
    parser.add_argument(
        "--packed", action="store_true", help="write what was in four bits in four bits again, which loses some of it"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file; default: 5GB")


def command(args: argparse.Namespace) -> int:
    """Loads, merges, writes."""
    found = target.find(args.target, args.overrides)
    mesh_.start(found.config.mesh)
    model, params = target.load(found)
    made = tree.merge(params)
    made = errors.repacked(made, params, model.names) if args.packed else made
    how = {"dtype": args.dtype, "max_shard_size": args.max_shard_size, "packed": args.packed}
    folder = model_.save_hf(model, made, args.out, **how)
    if rows := list(errors.merging(params, model.names, None if args.dtype is None else jnp.dtype(args.dtype))):
        precision.show_merged(rows, args.packed)
        report = {"total": precision.shares(*rows), "layers": {row.module: precision.shares(row) for row in rows}}
        if jax.process_index() == 0:
            (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    auto = "AutoModelForSequenceClassification" if model.config.labels else "AutoModelForCausalLM"
    print(f"Wrote {folder}. Load it with {auto}.from_pretrained({str(args.out)!r}).")
    return 0
