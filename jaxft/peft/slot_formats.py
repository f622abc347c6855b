"""Slots in peft's format: a few whole tensors that belong to no module, and the sizes of the model they were made for.

peft stores what an encoder makes, never the encoder, so a slot that is read back is plain rows; they train on as such.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.weight import Slot
from jaxft.peft import disk
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


OTHER = "The adapter was made for another model, or its files do not belong together."


def features(params: tree.Params) -> int:
    """Width of the embeddings."""
    return params["embed"]["tokens"].shape[-1]


def key_features(params: tree.Params) -> int:
    """Width of the keys of one layer, all heads together; of a fused projection, half of what is not the queries'."""
    attn = params["layers"]["attn"]
    return attn["k"].shape[-1] if "k" in attn else (attn["qkv"].shape[-1] - attn["o"].shape[-2]) // 2
