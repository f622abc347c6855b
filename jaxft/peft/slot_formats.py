"""Slots in peft's format: a few whole tensors that belong to no module, and the sizes of the model they were made for.

peft stores what an encoder makes, never the encoder, so a slot that is read back is plain rows; they train on as such.
Modules trained whole beside a slot are stored as in any adapter, under names that are shorter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.core.weight import Slot
from jaxft.peft import disk, places
from jaxft.peft.disk import AdapterError, Tensors

Fields = dict[str, Any]
Shapes = dict[str, tuple[int | None, ...]]
ROWS = "prompt_embeddings"
FIELDS = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
"""The config fields that all slots have."""


@dataclass(frozen=True)
class SlotFormat:
    """How peft stores one kind of slot; to `hf` it is what a `formats.Format` is."""

    peft_type: str
    """Its name in adapter_config.json."""
    leaf: type
    """The Slot that holds it."""
    place: str
    """Where in the parameters."""
    own: tuple[str, ...]
    """Config fields besides `FIELDS` that are read, or that change nothing a trained slot computes."""
    shapes: Callable[[Fields, tree.Params], Shapes]
    """(config, params) -> the tensors by whole name, `ROWS` among them, and the shapes that fit the model."""
    write: Callable[[Any], tuple[Fields, dict[str, Any]]]
    """(slot) -> (config fields, tensors by whole name)."""
    read: Callable[[Fields, dict[str, Any]], Slot]
    """The inverse, for float32 tensors of these shapes."""
    refuse: Callable[[object, Fields], None] = lambda where, config: None
    """(where, config): raises AdapterError for a value of a known field that is not understood."""
    claims: Callable[[Fields], bool] = lambda config: True
    biases: bool = False
    saves: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """All config fields that are understood."""
        return (*FIELDS, *self.own)


def export(form: SlotFormat, params: tree.Params) -> tuple[Fields, Tensors]:
    """Config fields and tensors of the slot in ``params``."""
    fields, tensors = form.write(params[form.place])
    sizes = {"num_layers": tree.num_layers(params), "num_transformer_submodules": 1}
    config = {**sizes, "num_virtual_tokens": len(tensors[ROWS]), **fields}
    return config, {f"/{name}": disk.host(array) for name, array in tensors.items()}


def restore(form: SlotFormat, where: object, config: Fields, tensors: Tensors, params: tree.Params) -> tree.Params:
    """The parameters with the slot; takes its tensors out of ``tensors``. Raises AdapterError for a slot of another
    model."""
    sizes = {"num_layers": tree.num_layers(params), "num_transformer_submodules": 1}
    if form.place in params:
        raise AdapterError(where, f"a second {form.place}", "parameters without one", "Load it on the base model.")
    for field, size in sizes.items():
        if config.get(field) not in (None, size):
            raise AdapterError(f"{where}: {field}", repr(config[field]), repr(size), OTHER)
    config, held = {**config, **sizes}, {}
    for name, shape in form.shapes(config, params).items():
        array = tensors.pop(f"/{name}", None)
        if array is None:
            raise AdapterError(where, f"no tensor {name}", "all tensors of the adapter", "It was not saved whole.")
        if array.shape != shape:
            raise AdapterError(f"{where}: {name}", f"shape {list(array.shape)}", f"{list(shape)}", OTHER)
        held[name] = jnp.asarray(array.astype(np.float32))
    return {**params, form.place: form.read(config, held)}


BASE = "base_model."
"""What the names of the model's own modules begin with: beside a slot peft wraps none, so it is shorter than
`disk.PREFIX`."""


def beside(tensors: Tensors) -> Tensors:
    """The tensors of modules as they are called beside a slot, those of the slot as they are."""
    return {(name if name.startswith("/") else f"/{BASE}{name}"): array for name, array in tensors.items()}


def rename(tensors: Tensors) -> None:
    """The inverse, in place."""
    for name in list(tensors):
        whole = disk.whole_name(name)
        if whole.startswith(BASE):
            tensors[whole.removeprefix(BASE)] = tensors.pop(name)


def looked_up(form: SlotFormat, tensors: Tensors, saved: list[Name]) -> list[Name]:
    """The modules of ``saved`` that peft uses beside a slot: beside a prompt it looks the tokens up in the model's own
    embedding, and the copy that it saves, which is taken out, never trained."""
    unused = [name for name in saved if name.path == places.TOKENS and form.place == "prompt"]
    for name in unused:
        tensors.pop(f"{name.module}.weight", None)
    return [name for name in saved if name not in unused]


OTHER = "The adapter was made for another model, or its files do not belong together."


def features(params: tree.Params) -> int:
    """Width of the embeddings."""
    return params["embed"]["tokens"].shape[-1]


def key_features(params: tree.Params) -> int:
    """Width of the keys of one layer, all heads together; of a fused projection, half of what is not the queries'."""
    attn = params["layers"]["attn"]
    return attn["k"].shape[-1] if "k" in attn else (attn["qkv"].shape[-1] - attn["o"].shape[-2]) // 2
