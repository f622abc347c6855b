"""Matrices as AutoGPTQ and GPTQModel store them (``quant_method: gptq``): one layer to named tensors, and back.

In the place of ``NAME.weight`` lie ``.qweight`` (int32[in * bits / 32, out], neighbours of a column in a word),
``.qzeros`` (int32[groups, out * bits / 32], neighbours of a row), ``.scales`` (floating[groups, out]) and ``.g_idx``
(int32[in], the group of each row). The first version of the format stores each zero point less one; in ``gptq_v2`` it
is as it is.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.quant import groups, words
from jaxft.quant.groups import IntGroups
from jaxft.quant.words import Found

PARTS = ("qweight", "qzeros", "scales", "g_idx")
V1, V2 = "gptq", "gptq_v2"


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why weights of this ``quantization_config`` cannot be read; None if they can."""
    form = version(config)
    if config.get("bits") not in (4, 8):
        return f"weights that GPTQ quantised to {config.get('bits')} bits"
    if form not in (V1, V2) or config.get("is_marlin_format"):
        return f"weights quantised with GPTQ in the {'marlin' if config.get('is_marlin_format') else form} format"
    if config.get("pack_dtype", "int32") != "int32":
        return f"weights quantised with GPTQ and packed in {config['pack_dtype']}"
    own = [rule for rule, how in (config.get("dynamic") or {}).items() if how and not rule.startswith("-")]
    return f"weights quantised with GPTQ and settings of their own for {own[0]}" if own else None


def version(config: Mapping[str, Any]) -> str:
    """Which form of the zero points."""
    return config.get("checkpoint_format") or config.get("format") or V1


def shape(sizes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], found: Found) -> tuple[int, ...]:
    """[out, in] of the matrix that tensors of these sizes stand for."""
    del found
    rows, columns = sizes["qweight"]
    return columns, rows * 32 // config["bits"]


def weight(found: Found, config: Mapping[str, Any], dtype: str) -> IntGroups:
    """The matrix that `tensors` (or GPTQModel) stored. ``dtype``: of its dense form.

    Raises ValueError naming the tensor that is missing or does not fit."""
    bits, codes = config["bits"], words.unpacked(words.part(found, "qweight"), config["bits"], 0)
    rows, columns = codes.shape
    size = rows if config.get("group_size", -1) == -1 else config["group_size"]
    count = math.ceil(rows / size)
    scale = words.floats(found, "scales", (count, columns))
    zero = words.unpacked(words.part(found, "qzeros", (count, columns * bits // 32)), bits, 1)
    if version(config) == V1:
        zero = (zero + np.uint8(1)) & np.uint8(2**bits - 1)  # of 0, what was stored had wrapped around
    index = np.arange(rows, dtype=np.int32) // size
    if "g_idx" in found:
        index = words.groups_of(words.part(found, "g_idx", (rows,)), count, "g_idx")
    return groups.stored(codes, scale, zero, index, bits, dtype)


def tensors(w: IntGroups, name: str = "weight", form: str = V1) -> dict[str, np.ndarray]:
    """The tensors of one matrix (no stack) whose zero points are whole, in the place of ``name``."""
    rows, columns = w.shape
    count = w.scale.shape[-2]
    zero = np.full((count, columns), 2 ** (w.bits - 1), np.uint8) if w.zero is None else np.asarray(w.zero)
    stored = zero - np.uint8(1) if form == V1 else zero
    index = np.arange(rows) // (rows // count) if w.group is None else np.asarray(w.group)
    found = {
        "qweight": words.packed(np.asarray(w.indices()), w.bits, 0),
        "qzeros": words.packed(stored & np.uint8(2**w.bits - 1), w.bits, 1),
        "scales": np.asarray(w.scale),
        "g_idx": index.astype(np.int32),
    }
    module = name.removesuffix("weight")
    return {f"{module}{key}": array for key, array in found.items()}


def described(w: IntGroups, name: str = "weight", form: str = V1) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """(dtype, shape) of each of `tensors` of one matrix; nothing is computed."""
    del form
    (rows, columns), count, per = w.shape, w.scale.shape[-2], 32 // w.bits
    sizes = {
        "qweight": (np.int32, (rows // per, columns)),
        "qzeros": (np.int32, (count, columns // per)),
        "scales": (w.scale.dtype, (count, columns)),
        "g_idx": (np.int32, (rows,)),
    }
    module = name.removesuffix("weight")
    return {f"{module}{key}": (np.dtype(dtype), shape) for key, (dtype, shape) in sizes.items()}


def fits(w: Any) -> bool:
    """Whether the format can hold a weight: whole zero points, and sizes that fill its words."""
    if not isinstance(w, IntGroups) or (w.zero is not None and w.zero.dtype != np.uint8):
        return False
    return not any(n % (32 // w.bits) for n in w.shape[-2:])
