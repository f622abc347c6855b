"""`jaxft quantize TARGET --out DIR`: a model in four bits, as bitsandbytes stores it: `transformers` and we load it."""

import argparse
import dataclasses
from pathlib import Path

from jaxft import model as model_
from jaxft.border.errors import ConfigError
from jaxft.cli import target
from jaxft.core import tree
from jaxft.core.weight import Weight
from jaxft.quant import QuantConfig, chosen, four_bit


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target and where to write; ``quant.`` keys say how."""
    target.add(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file; default: 5GB")


def command(args: argparse.Namespace) -> int:
    """Loads layer by layer into few bits, writes."""
    found = target.find(args.target, args.overrides)
    if found.adapter is not None:
        raise ConfigError(
            f"{args.target}: got an adapter; expected a model. Work it in first: jaxft merge {args.target}"
        )
    quant = chosen(found.config.quant) or dataclasses.replace(found.config.quant, method="nf4")
    if quant.method not in four_bit.KINDS:
        raise ConfigError(
            f"quant.method: got {quant.method}; expected one of {', '.join(four_bit.KINDS)} to be written"
        )
    found = dataclasses.replace(found, config=dataclasses.replace(found.config, quant=quant))
    model, params = target.load(found)
    folder = model_.save_hf(model, params, args.out, max_shard_size=args.max_shard_size, packed=True)
    print(_summary(params, quant))
    print(f"Wrote {folder}. jaxft and transformers (with bitsandbytes) load it as it is.")
    return 0


def _summary(params: tree.Params, quant: QuantConfig) -> str:
    weights = [w for _, w in tree.paths(params, inside=False)]
    bases = [getattr(w, "base", w) for w in weights]
    packed = [w for w in bases if isinstance(w, Weight) and w.packed]
    size = sum(w.nbytes for w in packed)  # type: ignore[attr-defined]
    held = sum(tree.count(w) for w in packed)
    return f"{quant.method}: {held:,} of {tree.count(params):,} parameters, at {8 * size / held:.2f} bits each"
