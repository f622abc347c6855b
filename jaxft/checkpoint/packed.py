"""Checkpoints whose matrices are stored in few bits by other tools, read as they are: nothing is quantised again."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxft.checkpoint import reader
from jaxft.checkpoint.errors import CheckpointError
from jaxft.checkpoint.tensorfile import Reader, Tensor
from jaxft.core.weight import Weight
from jaxft.quant import bitsandbytes

Parts = dict[str, dict[str, Tensor]]  # name of a weight -> its tensors by name
ONE_FORM = "A stack of layers is kept in one form: quantise the original with jaxft instead."


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why a ``quantization_config`` cannot be read; None if it can."""
    method = config.get("quant_method", "an unknown method")
    if method != "bitsandbytes":
        return f"weights quantised with {method}"
    four_bits = config.get("load_in_4bit") or config.get("_load_in_4bit")
    return None if four_bits else "weights quantised to 8 bits by bitsandbytes"


def fold(files: Reader, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], Parts]:
    """(one tensor for each weight, standing in its true shape where it is packed; what the packed ones consist of)."""
    states = {name.partition(bitsandbytes.STATE)[0]: name for name in found if bitsandbytes.STATE in name}
    parts: Parts = {}
    for weight, state in states.items():
        parts[weight] = {n: t for n, t in found.items() if n == weight or n.startswith(f"{weight}.")}
        if weight not in found:
            raise CheckpointError(found[state].where, f"a quant state without '{weight}'", "both", "Fetch it again.")
    within = {name for group in parts.values() for name in group}
    whole = {name: tensor for name, tensor in found.items() if name not in within}
    for weight, state in states.items():
        whole[weight] = dataclasses.replace(found[weight], shape=_shape(files, found[state]), packed=True)
    return whole, parts


def _shape(files: Reader, state: Tensor) -> tuple[int, ...]:
    """The shape that a quant state tells."""
    try:
        return tuple(int(n) for n in json.loads(bytes(files.whole(state)))["shape"])
    except (ValueError, KeyError, TypeError) as error:
        got = f"a quant state that cannot be read ({error})"
        raise CheckpointError(state.where, got, "JSON with a shape", "Fetch the file again.") from None


def read(
    files: Reader, tensors: list[Tensor], parts: Parts, stacked: bool, places: Callable[[Weight], Any] | None
) -> Weight:
    """One leaf from its packed tensors. Raises CheckpointError where one is damaged or unlike the others."""
    kinds = set()

    def layer(tensor: Tensor) -> Weight:
        if not tensor.packed:
            raise CheckpointError(tensor.where, "a plain weight", "a packed one, like other layers'", ONE_FORM)
        found = {n.replace(tensor.name, "weight", 1): files.whole(t) for n, t in parts[tensor.name].items()}
        try:
            made = bitsandbytes.weight(found)
        except ValueError as error:
            raise CheckpointError(tensor.where, str(error), "a matrix as bitsandbytes stores it", "") from None
        kinds.add(jax.tree.structure(made))
        if len(kinds) > 1:
            raise CheckpointError(
                tensor.where, repr(made), "the data type and blocks of the layers before it", ONE_FORM
            )
        return made

    return reader.stack(map(layer, tensors), len(tensors) if stacked else None, places)
