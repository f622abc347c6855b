"""`jaxft combine ADAPTER ADAPTER --weights 0.7,0.3 --how ties --out FOLDER`: several adapters of one base as one."""

import argparse
from pathlib import Path

from jaxft import model as model_
from jaxft import peft
from jaxft.border.errors import ConfigError
from jaxft.cli import arguments as arguments_
from jaxft.cli import target
from jaxft.peft import merging


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapters, how, and where to write."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="ADAPTER",
        help="folders of adapters or runs, all of one base; model.path=FOLDER says where that lies now",
    )
    parser.add_argument("--weights", help="of the adapters, 0.7,0.3 (--weights=-1,1 if one is negative); default: 1")
    parser.add_argument("--how", default="cat", choices=merging.HOWS, help="default: cat, their exact sum")
    parser.add_argument("--density", type=float, help="share of the numbers that ties, dare and magnitude_prune keep")
    parser.add_argument("--rank", type=int, help="of the result of svd; default: the largest of the adapters")
    parser.add_argument("--sign", default="total", choices=("total", "frequency"), help="whose sign counts in ties")
    parser.add_argument("--seed", type=int, default=0, help="of what dare zeroes; default: 0")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")


def command(args: argparse.Namespace) -> int:
    """Loads the base and its adapters, combines them, writes."""
    overrides = [word for word in args.words if "=" in word and not Path(word).exists()]
    # As stored unless asked otherwise: a module trained whole counts from the base, and its rounding would be added.
    dtype = [] if any(word.startswith("model.dtype=") for word in overrides) else ["model.dtype=auto"]
    found = [target.find(word, [*dtype, *overrides]) for word in args.words if word not in overrides]
    for name, one in zip(args.words, found, strict=False):
        if one.adapter is None:
            raise ConfigError(f"{name}: expected the folder of an adapter, or of a run that made one")
    bases = list(dict.fromkeys((one.config.model.path, one.config.model.revision) for one in found))
    if len(bases) > 1:
        paths = ", ".join(path for path, _ in bases)
        raise ConfigError(f"the adapters name different bases: {paths}; if they are the same, say model.path=<folder>")
    weights = arguments_.numbers("--weights", args.weights, float) if args.weights else None
    options = {"density": args.density, "rank": args.rank, "sign": args.sign, "seed": args.seed}
    merging.Recipe(args.how, **options)  # refuses what makes no sense before anything is read
    model, first = target.load(found[0])
    others = [model_.load_adapter(model, one.adapter) for one in found[1:] if one.adapter is not None]
    made = peft.combine([first, *others], weights, args.how, **options)
    print(f"Wrote {model_.save_adapter(model, made, args.out)}")
    return 0
