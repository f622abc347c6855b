"""Which tensors on disk make up which array of ours: the family's name map, laid beside the files that exist.

Everything that can be wrong with a checkpoint short of its values is found here, before any of it is read.
"""

import re
from dataclasses import dataclass
from typing import Any

from jaxft.checkpoint.errors import CheckpointError, some
from jaxft.checkpoint.tensorfile import FLOATS, Tensor
from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Affine
from jaxft.models import init
from jaxft.models.config import ModelConfig

# Constants that some versions of the checkpoints' own code saved beside the weights.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w*inv_freq|(attn|attention)\.(bias|masked_bias))$")
HEADS = ("lm_head.weight", "embed_out.weight")  # what a tied head is called where it was saved all the same
SCORE = "score"  # module of the head that scores sequences


@dataclass(frozen=True)
class Entry:
    """One array of the tree: ``tensors`` are its layers (or itself alone) on disk."""

    path: str
    """Path as `core.tree.paths` lists it."""
    shape: tuple[int, ...]
    """Stacked shape, ours: [L, in, out]."""
    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool
    """Whether the tensor on disk is [out, in]."""

    @property
    def disk_shape(self) -> tuple[int, ...]:
        """Shape of each tensor on disk."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def entries(config: ModelConfig, names: Names) -> tuple[Entry, ...]:
    """Every array of the tree with its tensors, in the order of the names."""
    sizes = init.shapes(config, names)
    found = []
    for name in names:
        shape, modules = sizes[name.path], name.modules(config.num_layers)
        weights = tuple(f"{module}.weight" for module in modules)
        found.append(Entry(_weight(name), shape, weights, name.stacked, name.kind == "linear"))
        if name.bias:
            biases = tuple(f"{module}.bias" for module in modules)
            size = shape if name.kind == "norm" else (*shape[:-2], shape[-1])
            found.append(Entry(f"{name.path}/bias", size, biases, name.stacked, False))
    return tuple(found)


def _weight(name: Name) -> str:
    """Path of the array that torch calls the module's ``weight``."""
    if name.kind == "norm":
        return f"{name.path}/scale"
    return f"{name.path}/base" if name.bias else name.path


def assemble(names: Names, leaves: dict[str, Any]) -> tree.Params:
    """The parameter tree from its arrays by path."""
    params: tree.Params = {}
    for name in names:
        weight, bias = leaves[_weight(name)], leaves.get(f"{name.path}/bias")
        if name.kind == "norm":
            value: Any = {"scale": weight} | ({"bias": bias} if name.bias else {})
        else:
            value = Affine(weight, bias) if name.bias else weight
        *folders, last = name.path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return params


def match(expected: tuple[Entry, ...], found: dict[str, Tensor], tied: bool, where: object) -> dict[str, Tensor]:
    """The tensor of every expected name, whatever prefix the checkpoint leaves out; everything verified.

    With ``tied``, a head saved all the same is returned too, under its name on disk. Raises CheckpointError naming
    what is missing, left over, of another shape, or of a dtype we do not read."""
    wanted = {name: entry for entry in expected for name in entry.tensors}
    prefix = _prefix(expected, found)
    tensors = {(prefix + name if prefix + name in wanted else name): t for name, t in found.items()}
    tensors = {name: t for name, t in tensors.items() if not BUFFERS.search(name)}
    missing = [name for name in wanted if name not in tensors]
    extra = [t.name for name, t in tensors.items() if name not in wanted and not (tied and name in HEADS)]
    scores = f"{SCORE}.weight" in wanted
    if missing:
        raise CheckpointError(
            where,
            f"no tensor {some(missing)}" + (f" (but also unknown ones: {some(extra)})" if extra else ""),
            "every tensor that config.json asks for",
            _missing_remedy(missing),
        )
    if extra:
        remedy = (
            "Nothing here uses them, so the model would not be the one that was saved. If they do not matter, load and "
            "save the checkpoint once with transformers' "
            f"{'AutoModelForSequenceClassification' if scores else 'AutoModelForCausalLM'}, which drops them."
        )
        raise CheckpointError(where, f"unused tensors {some(extra)}", "only tensors of this architecture", remedy)
    for name, tensor in tensors.items():
        _verify(tensor, wanted[name].disk_shape if name in wanted else tensor.shape)
    return tensors


def _prefix(expected: tuple[Entry, ...], found: dict[str, Tensor]) -> str:
    """What a checkpoint saved from the model without its head leaves out of every name: ``model.`` or nothing."""
    first = expected[0].tensors[0]  # the token embedding
    head, _, rest = first.partition(".")
    return f"{head}." if first not in found and rest in found else ""


def _missing_remedy(missing: list[str]) -> str:
    if missing == [f"{SCORE}.weight"]:
        return (
            "config.json says that it scores sequences (architectures), and the files hold a model without that head. "
            "If it is a language model, correct architectures; jaxft.reward_model then gives it a head to train."
        )
    if all(name in HEADS for name in missing):
        return (
            "The checkpoint seems to hold the base model without its head. If the head is the embedding, set "
            '"tie_word_embeddings": true in config.json; otherwise use the causal language model\'s checkpoint.'
        )
    return "Check that config.json belongs to these files and that all of them were downloaded."


def _verify(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in FLOATS and not tensor.packed:
        remedy = "Quantised and fp8 checkpoints are not read: use the original, or dequantise it to bfloat16 first."
        raise CheckpointError(tensor.where, f"dtype {tensor.dtype}", f"one of {', '.join(FLOATS)}", remedy)
    if tensor.shape not in (shape, shape[::-1] if tensor.packed else shape):
        remedy = "config.json and the weights disagree: correct the field it comes from"
        if tensor.name.rpartition(".")[0].endswith(SCORE):
            remedy += f' ("id2label" with an entry for each of the {tensor.shape[0]} outputs)'
        elif tensor.shape[1:] == shape[1:] and len(shape) == 2:
            remedy += f' (an embedding or head of {tensor.shape[0]} rows wants "vocab_size": {tensor.shape[0]})'
        raise CheckpointError(tensor.where, f"shape {list(tensor.shape)}", f"{list(shape)}", remedy + ".")
