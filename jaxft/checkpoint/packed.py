"""Checkpoints whose matrices are stored in few bits by other tools, read as they are: nothing is quantised again."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.checkpoint import reader
from jaxft.checkpoint.errors import CheckpointError
from jaxft.checkpoint.layout import Entry
from jaxft.checkpoint.tensorfile import DTYPES, Reader, Tensor
from jaxft.core.weight import Weight
from jaxft.quant import IntGroups, awq, bitsandbytes, compressed_tensors, gptqmodel, groups, hqq

Config = Mapping[str, Any]
Parts = dict[str, dict[str, Tensor]]  # name of a weight -> its tensors by name
GROUPED: dict[str, Any] = {
    "gptq": gptqmodel, "awq": awq, "hqq": hqq, "compressed-tensors": compressed_tensors,
}  # fmt: skip
"""Formats of integers in groups, by ``quant_method``; the first of a format's PARTS tells a packed weight."""
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of their own where the formats' first tools told their settings, and the ``quant_method`` that they mean."""
ONE_FORM = "A stack of layers is kept in one form: quantise the original with jaxft instead."


def config_of(directory: Path, raw: Config) -> dict[str, Any] | None:
    """The ``quantization_config`` of a checkpoint, wherever it is told; None for one that is not quantised."""
    if raw.get("quantization_config") is not None:
        return dict(raw["quantization_config"])
    for name, method in BESIDE.items():
        if (directory / name).exists():
            try:
                return {"quant_method": method, **json.loads((directory / name).read_text(encoding="utf-8"))}
            except (ValueError, TypeError) as error:
                got = f"text that is not a JSON object ({error})"
                raise CheckpointError(directory / name, got, "one", "Fetch it again.") from None
    return None


def refusal(config: Config) -> str | None:
    """Why a ``quantization_config`` cannot be read; None if it can."""
    method = config.get("quant_method", "an unknown method")
    if method in GROUPED:
        return GROUPED[method].refusal(config)
    if method != "bitsandbytes":
        return f"weights quantised with {method}"
    four_bits = config.get("load_in_4bit") or config.get("_load_in_4bit")
    return None if four_bits else "weights quantised to 8 bits by bitsandbytes"


def fold(
    files: Reader, found: dict[str, Tensor], config: Config, wanted: Iterable[str]
) -> tuple[dict[str, Tensor], Parts]:
    """(one tensor for each weight, standing in its true shape where it is packed; what the packed ones consist of).

    ``wanted``: the tensors that the model has; zeros saved as a bias of a packed weight that has none are left out."""
    form = GROUPED.get(config.get("quant_method", ""))
    if form is None:
        return _fold_bitsandbytes(files, found)
    mark = f".{form.PARTS[0]}"
    parts: Parts = {}
    whole = dict(found)
    known = {name for full in wanted for name in (full, full.partition(".")[2])}
    for first in [name for name in found if name.endswith(mark)]:
        module = first.removesuffix(mark)
        mine = {f"{module}.{part}" for part in form.PARTS} & found.keys()
        tensors = parts[f"{module}.weight"] = {name: whole.pop(name) for name in sorted(mine)}
        for tensor in tensors.values():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(tensor.where, f"dtype {tensor.dtype}", f"one of {', '.join(DTYPES)}", "")
        bias = f"{module}.bias"
        if bias in found and bias not in known and not np.any(files.whole(found[bias])):
            del whole[bias]
        shape = _checked(found[first], lambda t=tensors, m=module: _shape(files, form, t, m, config))
        whole[f"{module}.weight"] = dataclasses.replace(found[first], name=f"{module}.weight", shape=shape, packed=True)
    return whole, parts


def _shape(files: Reader, form: Any, tensors: dict[str, Tensor], module: str, config: Config) -> tuple[int, ...]:
    """What the tensors of one packed weight say of its shape."""
    sizes = {name.removeprefix(f"{module}."): tensor.shape for name, tensor in tensors.items()}
    if len(sizes[form.PARTS[0]]) != 2:
        raise ValueError(f"{form.PARTS[0]}: got shape {list(sizes[form.PARTS[0]])}; expected a matrix")
    told = {n: files.whole(t) for name, t in tensors.items() if (n := name.rpartition(".")[2]).endswith("shape")}
    return form.shape(sizes, config, told)


def _fold_bitsandbytes(files: Reader, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], Parts]:
    states = {name.partition(bitsandbytes.STATE)[0]: name for name in found if bitsandbytes.STATE in name}
    parts: Parts = {}
    for weight, state in states.items():
        parts[weight] = {n: t for n, t in found.items() if n == weight or n.startswith(f"{weight}.")}
        if weight not in found:
            raise CheckpointError(found[state].where, f"a quant state without '{weight}'", "both", "Fetch it again.")
    within = {name for group in parts.values() for name in group}
    whole = {name: tensor for name, tensor in found.items() if name not in within}
    for weight, state in states.items():
        whole[weight] = dataclasses.replace(found[weight], shape=_told(files, found[state]), packed=True)
    return whole, parts


def _told(files: Reader, state: Tensor) -> tuple[int, ...]:
    """The shape that a quant state tells."""
    try:
        return tuple(int(n) for n in json.loads(bytes(files.whole(state)))["shape"])
    except (ValueError, KeyError, TypeError) as error:
        got = f"a quant state that cannot be read ({error})"
        raise CheckpointError(state.where, got, "JSON with a shape", "Fetch the file again.") from None


def _checked(tensor: Tensor, call: Callable[[], Any], expected: str = "a whole packed matrix") -> Any:
    try:
        return call()
    except ValueError as error:
        raise CheckpointError(tensor.where, str(error), expected, "") from None


def read(
    files: Reader,
    entry: Entry,
    tensors: list[Tensor],
    parts: Parts,
    config: Config,
    dtype: Any,
    places: Callable[[Weight], Any] | None,
) -> Weight:
    """One leaf from its packed tensors; ``dtype``: of its dense form, where the format tells none.

    Raises CheckpointError where one is damaged or unlike the others."""
    kinds = set()
    form: Any = GROUPED.get(config.get("quant_method", ""))
    size = entry.shape[1:] if entry.stacked else entry.shape

    def layer(tensor: Tensor) -> Weight:
        if not tensor.packed:
            raise CheckpointError(tensor.where, "a plain weight", "a packed one, like other layers'", ONE_FORM)
        found = {name: files.whole(t) for name, t in parts[tensor.name].items()}
        module = tensor.name.removesuffix("weight")
        if form is None:
            named = {n.replace(tensor.name, "weight", 1): array for n, array in found.items()}
            made = _checked(tensor, lambda: bitsandbytes.weight(named), "a matrix as bitsandbytes stores it")
        else:
            named = {n.removeprefix(module): array for n, array in found.items()}
            expected = f"a matrix as {config['quant_method']} stores it"
            made = _checked(tensor, lambda: form.weight(named, config, np.dtype(dtype).name), expected)
        if made.shape != size:
            raise CheckpointError(tensor.where, repr(made), f"{list(size)}, inputs and outputs", "Fetch it again.")
        kinds.add((jax.tree.structure(made), *(a.shape for a in jax.tree.leaves(made))))
        if len(kinds) > 1:
            raise CheckpointError(
                tensor.where, repr(made), "the data type and blocks of the layers before it", ONE_FORM
            )
        return made

    whole = reader.stack(map(layer, tensors), len(tensors) if entry.stacked else None, places)
    if not isinstance(whole, IntGroups):
        return whole
    whole = groups.simplified(whole)
    return whole if places is None else jax.device_put(whole, places(whole))
