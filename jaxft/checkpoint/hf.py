"""Hugging Face checkpoints in: a directory or hub id to (config, names, params, raw config).

Everything is verified from the headers before a single weight is read, so nothing is ever half-loaded. What is not
understood (a pickle, a quantised file, a tensor too many) is refused with the way out.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint import hub, layout, packed, reader, tensorfile
from jaxft.checkpoint.errors import CheckpointError, some
from jaxft.checkpoint.originals import Originals
from jaxft.checkpoint.reader import Place
from jaxft.checkpoint.tensorfile import Reader, Tensor
from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.core.weight import Weight
from jaxft.models import families
from jaxft.models.config import ModelConfig
from jaxft.quant import FourBit, QuantConfig, chosen
from jaxft.sharding import rules

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES: dict[str, Any] = {name: np.dtype(name) for name in ("float32", "float16")} | {
    "bfloat16": np.dtype(jnp.bfloat16)
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
Packer = Callable[[jax.Array], Weight]
CONVERT = (
    'python -c "from transformers import {2} as M, AutoTokenizer as T; '
    "d, o = '{0}', '{1}-safetensors'; M.from_pretrained(d, dtype='auto').save_pretrained(o); "
    'T.from_pretrained(d).save_pretrained(o)"'
)


class Loaded(NamedTuple):
    """A checkpoint in memory."""

    config: ModelConfig
    names: Names
    params: tree.Params
    raw: dict[str, Any]
    """config.json as it was."""
    originals: Originals | None = None
    """What weights that were packed while loading were made from."""


def load(
    source: str | os.PathLike[str],
    dtype: str = "bfloat16",
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    sharding: Place | None = None,
    quantize: str | QuantConfig | None = None,
) -> Loaded:
    """Reads a model's directory or hub id.

    ``dtype``: float32, bfloat16, float16, or auto (what the checkpoint says). With a ``mesh`` each leaf is laid out by
    `sharding.rules`; ``sharding(path, shape)`` (paths as `core.tree.paths` lists them) decides instead. Otherwise all
    is on the default device. ``quantize``: a `QuantConfig` or its method, for weights that are not quantised yet: each
    layer is packed as it is read. Raises CheckpointError, or ValueError for a config.json that is not understood."""
    directory = hub.directory(source, revision)
    raw = config_of(directory)
    config, names = families.read(raw | {"quantization_config": None}, str(directory / "config.json"))
    entries = layout.entries(config, names)
    quant = _quant(chosen(quantize), raw, names, directory)
    if quant and sharding is not None:
        raise ValueError("sharding: got a function; expected a mesh, by which quantised weights are laid out")
    if mesh is not None and sharding is None:
        sharding = _places(entries, names, mesh)
    leaves = {}
    with Reader() as files:
        stored = raw.get("quantization_config") or {}
        found, parts = packed.fold(files, tensors_of(directory), stored, (n for e in entries for n in e.tensors))
        tensors = layout.match(entries, found, config.tie_embeddings, directory)
        target = _dtype(dtype, raw, tensors[entries[0].tensors[0]])
        if config.tie_embeddings:
            _verify_tied(files, tensors, entries[0].tensors[0])
        for entry in entries:
            place = None if sharding is None else sharding(entry.path, entry.shape)
            mine = [tensors[name] for name in entry.tensors]
            within = None if place is None or mesh is None else functools.partial(_inside, entry, names, mesh)
            if any(t.packed for t in mine):
                leaves[entry.path] = packed.read(files, entry, mine, parts, stored, target, within)
            elif entry.path in quant:
                leaves[entry.path] = reader.read_packed(files, entry, mine, target, place, quant[entry.path], within)
            else:
                leaves[entry.path] = reader.read(files, entry, mine, target, place)
    if isinstance(quantize, QuantConfig) and quantize.method == "none" and quantize.compute != "exact":
        leaves = _computed(leaves, quantize.compute, directory)
    sources = {entry.path: (entry, tuple(tensors[name] for name in entry.tensors)) for entry in entries}
    originals = Originals(sources, target) if quant else None
    return Loaded(config, names, layout.assemble(names, leaves), raw, originals)


def _quant(config: QuantConfig | None, raw: dict[str, Any], names: Names, directory: Path) -> dict[str, Packer]:
    """What packs a weight, by path, for the weights to be quantised while loading."""
    if config is None:
        return {}
    if raw.get("quantization_config") is not None:
        remedy = "Leave quantize= (quant.method) out: it is loaded as it is stored."
        raise CheckpointError(directory, "weights that are quantised already", "plain ones to quantise", remedy)
    return {f"{name.path}/base" if name.bias else name.path: config.pack for name in config.picked(names)}


def _computed(leaves: dict[str, Any], compute: str, directory: Path) -> dict[str, Any]:
    """The leaves, those that were stored in four bits to be multiplied in eight."""
    four = {path: dataclasses.replace(w, compute=compute) for path, w in leaves.items() if isinstance(w, FourBit)}
    if not four:
        remedy = "Set quant.method=nf4 to pack it, or leave quant.compute out."
        raise CheckpointError(
            directory, "a model without four-bit weights", f"some for quant.compute={compute}", remedy
        )
    return leaves | four


def _inside(entry: layout.Entry, names: Names, mesh: jax.sharding.Mesh, w: Weight) -> Any:
    """Where `sharding.rules` puts the arrays of a packed leaf."""
    return rules.of(next(n.path for n in names if entry.path in (n.path, f"{n.path}/base")), w, mesh)


def _places(entries: tuple[layout.Entry, ...], names: Names, mesh: jax.sharding.Mesh) -> Place:
    """Where `sharding.rules` puts each leaf."""
    abstract = layout.assemble(names, {e.path: jax.ShapeDtypeStruct(e.shape, jnp.float32) for e in entries})
    places = dict(tree.paths(rules.shardings(abstract, mesh)))
    return lambda path, shape: places[path]


def config_of(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a causal language model, quantised in a way that is understood or not at all."""
    file = directory / "config.json"
    if not file.exists():
        if (directory / "adapter_config.json").exists():
            remedy = "Load its base model, then jaxft.load_adapter(model, this directory)."
            raise CheckpointError(directory, "an adapter", "a model", remedy)
        for path in sorted(directory.glob("*.gguf")):
            raise hub.gguf(path)
        held = some(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise CheckpointError(directory, f"no config.json (it holds {held})", "a model's directory", "Check the path.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(file, f"text that is not JSON ({error})", "a JSON object", "Fetch it again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(file, f"a JSON {type(raw).__name__}", "a JSON object", "Fetch it again.")
    stored = packed.config_of(directory, raw)
    if stored is None:
        return raw
    if got := packed.refusal(stored):
        remedy = "Load the original checkpoint it was made from; quantise that if memory asks for it (quantize=nf4)."
        read = "4 bits of bitsandbytes, 4 or 8 of GPTQ, AWQ, HQQ or compressed-tensors"
        raise CheckpointError(file, got, f"{read}, or float32, float16 or bfloat16", remedy)
    return raw | {"quantization_config": stored}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the directory's safetensors files, by name. Raises CheckpointError if a file is absent, damaged
    or not what the index says, or if there are only pickles."""
    index = directory / INDEX
    if not index.exists():
        if (directory / SINGLE).exists():
            return tensorfile.header(directory / SINGLE)
        raise _no_weights(directory)
    try:
        where: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(index, f"an index without a weight map ({error})", "one", "Fetch it again.") from None
    files = sorted(set(where.values()))
    absent = [name for name in files if not (directory / name).exists()]
    if absent:
        remedy = "The download is not complete: fetch the missing files."
        raise CheckpointError(index, f"no file {some(absent)}", f"all {len(files)} shards it names", remedy)
    headers = {name: tensorfile.header(directory / name) for name in files}
    astray = [name for name, file in where.items() if name not in headers[file]]
    if astray:
        got = f"no tensor {some(astray)} in {some(sorted({where[n] for n in astray}))}"
        raise CheckpointError(index, got, "each tensor in the file that the index names", "Fetch the files again.")
    return {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}


def _no_weights(directory: Path) -> CheckpointError:
    """Why a directory without model.safetensors cannot be read, and what to do."""
    expected = f"{SINGLE}, or {INDEX} with its shards"
    pickles = sorted({path.name for pattern in PICKLES for path in directory.glob(pattern)})
    if pickles:
        remedy = (
            "A pickle runs code when it is opened and cannot be read piece by piece. Convert it once, where torch is "
            f"installed, and load the result: {CONVERT.format(directory, directory, _auto(directory))}"
        )
        return CheckpointError(directory, f"only pickled weights ({some(pickles)})", expected, remedy)
    for path in sorted(directory.glob("*.gguf")):
        return hub.gguf(path)
    held = some(sorted(p.name for p in directory.iterdir()))
    remedy = "The download is not complete, or the hub repository has only pickled weights (*.bin): "
    remedy += f"convert those, where torch is installed, with {CONVERT.format('ORG/NAME', 'NAME', _auto(directory))}"
    return CheckpointError(directory, f"no weights (it holds {held})", expected, remedy)


def _auto(directory: Path) -> str:
    """The class of `transformers` that loads the directory with its head."""
    classifies = families.labels(config_of(directory)) > 0
    return "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"


def dtype_named(name: str) -> Any:
    """The numpy dtype of float32, bfloat16 or float16. Raises ValueError for another name."""
    if name not in DTYPES:
        raise ValueError(f"dtype: got {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _dtype(name: str, raw: dict[str, Any], embedding: Tensor) -> Any:
    """The numpy dtype to load in; ``auto`` is config.json's, else the embedding's."""
    if name == "auto":
        name = raw.get("dtype") or raw.get("torch_dtype") or tensorfile.DTYPES[embedding.dtype].name
        name = "float32" if name == "float64" else name
    return dtype_named(name)


def _verify_tied(files: Reader, tensors: dict[str, Tensor], embedding: str) -> None:
    """Refuses a head that was saved although tied and is not the embedding."""
    for name in layout.HEADS:
        if name not in tensors:
            continue
        head, tokens = tensors[name], tensors[embedding]
        same = head.shape == tokens.shape and head.dtype == tokens.dtype
        step = max(1, tensorfile.CHUNK // max(1, tokens.nbytes // max(1, tokens.shape[0])))
        for row in range(0, tokens.shape[0] if same else 0, step):
            last = min(row + step, tokens.shape[0])
            same = same and bool(np.array_equal(files.rows(head, row, last), files.rows(tokens, row, last)))
        if not same:
            remedy = 'If the head is its own, set "tie_word_embeddings": false in config.json.'
            raise CheckpointError(head.where, "a head that differs from the embedding", "equal tensors (tied)", remedy)
