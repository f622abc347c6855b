"""`jaxft quantize TARGET --out DIR`: a model in few bits, written for `transformers` and us.

`quant.method=nf4` and `fp4` become checkpoints of bitsandbytes; `int4`, `int8_blockwise` and `gptq`, which measures the
model's inputs on the config's `data`, those of GPTQModel.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft import calibrate, data
from jaxft import model as model_
from jaxft.border.errors import ConfigError
from jaxft.cli import target
from jaxft.cli.target import Target
from jaxft.core import tree
from jaxft.core.weight import is_packed
from jaxft.data import Loader
from jaxft.model import Model
from jaxft.objectives import OBJECTIVES
from jaxft.quant import QuantConfig, config, four_bit

WRITTEN = (*four_bit.KINDS, *config.GROUPED, "gptq")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the target and where to write; ``quant.`` keys say how."""
    target.add(parser, ("model", "quant", "data"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file; default: 5GB")


def command(args: argparse.Namespace) -> int:
    """Loads layer by layer into few bits, or measures and then quantises layer by layer; writes."""
    found = target.find(args.target, args.overrides)
    if found.adapter is not None:
        raise ConfigError(
            f"{args.target}: got an adapter; expected a model. Work it in first: jaxft merge {args.target}"
        )
    quant = found.config.quant
    quant = dataclasses.replace(quant, method="nf4") if quant.method == "none" else quant
    if quant.method not in WRITTEN:
        raise ConfigError(f"quant.method: got {quant.method}; expected one of {', '.join(WRITTEN)} to be written")
    if quant.compute != "exact":
        raise ConfigError(
            f"quant.compute: got {quant.compute}; the file holds numbers, not how they are multiplied. Leave it "
            "out here and give it where the model is used."
        )
    if quant.method == "gptq":
        model, params = _calibrated(found, quant)
    else:
        model, params = target.load(_with(found, quant))
    folder = model_.save_hf(model, params, args.out, max_shard_size=args.max_shard_size, packed=True)
    print(_summary(params, quant))
    reader = "bitsandbytes" if quant.method in four_bit.KINDS else "gptqmodel"
    print(f"Wrote {folder}. jaxft and transformers (with {reader}) load it as it is.")
    return 0


def _with(found: Target, quant: QuantConfig) -> Target:
    return dataclasses.replace(found, config=dataclasses.replace(found.config, quant=quant))


def _calibrated(found: Target, quant: QuantConfig) -> tuple[Model, tree.Params]:
    """The model quantised by GPTQ. Raises ConfigError where there are no data to measure."""
    if not found.config.data.given:
        raise ConfigError("quant.method=gptq measures the model's inputs on data; say which: data.path=rows.jsonl")
    model, params = target.load(_with(found, dataclasses.replace(quant, method="none")))
    model = dataclasses.replace(model, params=params)
    if any(is_packed(w) for _, w in tree.paths(params, inside=False)):
        raise ConfigError(f"{found.config.model.path}: got weights that are quantised already; expected plain ones")
    if model.tokenizer is None:
        raise ConfigError(f"{found.config.model.path} holds no tokenizer; put the model's tokenizer files beside it")
    return model, calibrate.gptq(model, _batches(found, model, quant.gptq.samples), quant, _tell)


def _batches(found: Target, model: Model, samples: int) -> Iterator[dict[str, Any]]:
    """``samples`` rows of training data, as training would read them; fewer where there are no more."""
    settings = found.config.data
    data.install(model.tokenizer, settings.template)
    prepared = data.prepare(settings, model.tokenizer, OBJECTIVES[found.config.objective.name].rows)
    rows = min(found.config.train.batch, samples)
    loader = Loader(prepared.train, settings, batch_rows=rows)
    for i in range(min(-(-samples // rows), loader.batches_per_epoch)):
        yield loader.batch(i)


def _tell(done: int, of: int) -> None:
    print(f"\rgptq: layer {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


def _summary(params: tree.Params, quant: QuantConfig) -> str:
    weights = [w for _, w in tree.paths(params, inside=False)]
    bases = [getattr(w, "base", w) for w in weights]
    packed = [w for w in bases if is_packed(w)]
    size = sum(w.nbytes for w in packed)  # type: ignore[attr-defined]
    held = sum(tree.count(w) for w in packed)
    return f"{quant.method}: {held:,} of {tree.count(params):,} parameters, at {8 * size / held:.2f} bits each"
