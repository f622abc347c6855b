"""Checkpoints out, as `transformers` writes them: sharded safetensors, config, generation config, tokenizer.

Written tensor by tensor into a directory beside the target, synced, and renamed: it appears whole or not at all.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft.checkpoint import biases, hf, host, quantised, tensorfile, tokenizer
from jaxft.checkpoint.errors import CheckpointError
from jaxft.checkpoint.hf import Loaded
from jaxft.checkpoint.quantised import Form
from jaxft.core import tree, verbs
from jaxft.core.names import Name
from jaxft.core.weight import Affine, Split, Untied, Weight
from jaxft.quant import FourBit, IntGroups

# What AutoModelForCausalLM makes of a model_type; written when the source names no causal language model itself.
ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
HEAD = {"gpt_neox": "embed_out"}  # the head's module where it is not lm_head
UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10}


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: a layer of ``weight`` (or all of it, ``layer`` None), as it is to lie on disk."""

    name: str
    weight: Any
    layer: int | None
    transposed: bool
    form: Form | None = None
    """How the tensors of a matrix in few bits are written; None: dense."""

    @property
    def matrix(self) -> Any:
        """The weight of its layer."""
        return self.weight if self.layer is None else self.weight[self.layer]

    def described(self, dtype: np.dtype) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor of it on disk."""
        if self.form is None:
            return [(self.name, dtype, self.shape)]
        shapes = jax.eval_shape(lambda: self.matrix)
        return [(name, *how) for name, how in self.form.described(shapes, self.name).items()]

    def arrays(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The tensors, in that order, in host memory."""
        if self.form is None:
            yield _host(self, dtype)
            return
        yield from self.form.tensors(jax.tree.map(host.gather, self.matrix), self.name).values()

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.weight.shape if self.layer is None else self.weight.shape[1:]
        return shape[::-1] if self.transposed else shape


def save(
    model: Loaded,
    directory: str | os.PathLike[str],
    source: Path | None = None,
    own_tokenizer: Any = None,
    *,
    dtype: str | None = None,
    shard: int | str = "5GB",
    overwrite: bool = False,
    packed: bool = False,
) -> Path:
    """Writes the model; generation config and tokenizer files are copied from ``source``, the directory it came from,
    unless ``own_tokenizer`` is given. Weights in few bits are written dense, or with ``packed`` as bitsandbytes (nf4,
    fp4) or GPTQModel (integers in groups) stores them; others are refused then. Raises CheckpointError; on several
    hosts every process must call it."""
    target = Path(directory).expanduser().absolute()
    _refuse_occupied(target, overwrite)
    model = biases.switched_on(model)
    pieces = _pieces(model)
    if packed:
        form = quantised.form_of([(p.name, p.weight) for p in pieces])
        pieces = [
            p if not isinstance(p.weight, FourBit | IntGroups) else dataclasses.replace(p, form=form) for p in pieces
        ]
    kind = pieces[0].weight.dtype if dtype is None else hf.dtype_named(dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    first = jax.process_index() == 0
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)) if first else None
    try:
        _write_weights(work, pieces, np.dtype(kind), size_of(shard))
        if work is not None:
            _write_rest(work, model, source, own_tokenizer, np.dtype(kind).name, pieces)
            work.chmod(0o755)
            _sync(work)
            _replace(work, target)
    finally:
        if work is not None and work.exists():
            shutil.rmtree(work)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf")
    return target


def _refuse_occupied(target: Path, overwrite: bool) -> None:
    """Raises if the target holds something that may not, or should not, be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise CheckpointError(target, "a file", "a directory that does not exist yet", "Choose another path.")
    if not overwrite:
        remedy = "Choose another path (or, from Python, overwrite=True to replace it)."
        raise CheckpointError(target, "a directory that is not empty", "a new or empty one", remedy)
    if not (target / "config.json").exists():
        remedy = "It is not deleted, as it does not look like a model (no config.json): choose another path."
        raise CheckpointError(target, "a directory that is not empty", "an earlier checkpoint to overwrite", remedy)


def _pieces(model: Loaded) -> list[Piece]:
    """Every tensor in transformers' own order: embedding, layer by layer, final norm, head."""
    layers = [name for name in model.names if name.stacked]
    order: list[tuple[Name, int | None]] = []
    for name in model.names:
        if not name.stacked:
            order.append((name, None))
        elif name is layers[0]:
            order += [(row, i) for i in range(model.config.num_layers) for row in layers]
    return [piece for name, i in order for piece in _of(model, name, tree.get(model.params, name.path), i)]


def _of(model: Loaded, name: Name, weight: Any, layer: int | None) -> Iterator[Piece]:
    """The tensors of one module of one layer. Raises CheckpointError for an adapter."""
    module = name.module.format(layer)
    if name.kind == "norm":
        yield Piece(f"{module}.weight", weight["scale"], layer, False)
        if name.bias:
            yield Piece(f"{module}.bias", weight["bias"], layer, False)
        return
    bias = weight.bias if isinstance(weight, Affine) else None
    base = weight.base if isinstance(weight, Affine) else weight
    head = base.head if isinstance(base, Untied) else None
    base = base.base if isinstance(base, Untied) else base
    for part in (base, bias, head):
        if isinstance(part, Weight) and part.adapter:
            remedy = "Fold adapters in first: jaxft.save_hf(model, jaxft.merge(params), directory)."
            raise CheckpointError(name.path, f"a {type(part).__name__}", "a plain weight", remedy)
    if (bias is not None) != name.bias:
        got = "a bias" if bias is not None else "no bias"
        raise CheckpointError(name.path, got, f"what the {model.config.family} architecture has", "")
    yield Piece(f"{module}.weight", base, layer, name.kind == "linear")
    if bias is not None:
        yield Piece(f"{module}.bias", bias, layer, False)
    if head is not None:
        yield Piece(f"{HEAD.get(model.config.family, 'lm_head')}.weight", head, layer, False)


def size_of(text: int | str) -> int:
    """Bytes of ``5GB``, ``200MB``, ``20KB``, ``1GiB`` or a plain number."""
    if isinstance(text, int):
        return text
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    if text.strip().upper().endswith("IB"):
        number, unit = text.strip()[:-3], text.strip()[-3:].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError(f"max_shard_size: got {text!r}; expected bytes or a size such as '5GB' or '200MB'") from None


def _write_weights(work: Path | None, pieces: list[Piece], dtype: Any, limit: int) -> None:
    """All tensors, in shards of at most ``limit`` bytes (a larger tensor has its own), and their index."""
    entries = [piece.described(dtype) for piece in pieces]
    sizes = [sum(int(np.prod(shape)) * kind.itemsize for _, kind, shape in entry) for entry in entries]
    shards: list[list[int]] = []
    held = 0
    for i, size in enumerate(sizes):
        if not shards or held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(i)
        held += size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [hf.SINGLE] if len(shards) == 1 else names
    for file, shard in zip(names, shards, strict=True):
        arrays = (array for i in shard for array in pieces[i].arrays(dtype))
        if work is None:  # another process writes; this one takes part in the gathering
            for _ in arrays:
                pass
        else:
            tensorfile.write(work / file, [entry for i in shard for entry in entries[i]], arrays)
    if work is not None and len(shards) > 1:
        where = {e[0]: file for file, shard in zip(names, shards, strict=True) for i in shard for e in entries[i]}
        elements = sum(int(np.prod(piece.shape)) for piece in pieces)
        index = {"metadata": {"total_parameters": elements, "total_size": sum(sizes)}, "weight_map": where}
        _write_json(work / hf.INDEX, index)


def _host(piece: Piece, dtype: Any) -> np.ndarray:
    """One tensor in host memory, as it is to be written."""
    weight, layer = piece.weight, piece.layer
    if isinstance(weight, Weight):  # stored in fewer bits
        array = verbs.dense(weight if layer is None else weight[layer])
    elif layer is None or isinstance(weight, Split):
        array = weight if layer is None else weight[layer]
    else:
        array = _layer(weight, layer)
    array = host.gather(array)
    array = array.T if piece.transposed else array
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    if dtype == np.float16 and array.dtype != np.float16:
        tensorfile.fits_float16(f"tensor '{piece.name}'", array)
    out = np.empty(array.shape, dtype)
    tensorfile.copy(array, out)
    return out


def _layer(weight: Any, layer: int) -> Any:
    """One layer of a stack, without a copy of the rest."""
    return np.asarray(weight)[layer] if host.visible(weight) else _take(weight, layer)


@jax.jit
def _take(weight: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)


def config_of(model: Loaded, dtype: str) -> dict[str, Any]:
    """The source's config.json, with what has changed."""
    raw = dict(model.raw)
    raw["torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"] = dtype
    embedding = tree.get(model.params, "embed/tokens")
    raw["vocab_size"] = embedding.shape[0]
    if isinstance(embedding, Untied):
        raw["tie_word_embeddings"] = False
    if model.config.labels:  # its config says so already: it was read from one, or made by jaxft.reward_model
        return raw
    named = [name for name in raw.get("architectures") or () if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if not named and model.config.family in ARCHITECTURES:
        raw["architectures"] = [ARCHITECTURES[model.config.family]]
    return raw


def _write_rest(
    work: Path, model: Loaded, source: Path | None, own_tokenizer: Any, dtype: str, pieces: list[Piece]
) -> None:
    """config.json, generation_config.json and the tokenizer."""
    raw = config_of(model, dtype)
    raw.pop("quantization_config", None)
    forms = [piece.form for piece in pieces if piece.form is not None]
    if forms:
        plain = [p.name for p in pieces if p.form is None and len(p.shape) == 2]
        raw["quantization_config"] = forms[0].config([p.name for p in pieces if p.form is not None], plain, dtype)
    _write_json(work / "config.json", raw)
    if source is not None and (source / "generation_config.json").is_file() and not model.config.labels:
        shutil.copyfile(source / "generation_config.json", work / "generation_config.json")
    if own_tokenizer is not None:
        own_tokenizer.save_pretrained(work)
    elif source is not None:
        tokenizer.copy(source, work)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Makes a directory and the files in it survive a crash."""
    for entry in [*path.rglob("*"), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(work: Path, target: Path) -> None:
    """Puts the finished directory in place of the target; an earlier one is moved aside first, then deleted."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.rename(target, old / target.name)
    os.rename(work, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if old is not None:
        shutil.rmtree(old)
