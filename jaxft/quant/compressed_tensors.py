"""Matrices as compressed-tensors stores them in the ``pack-quantized`` format, to be read.

In the place of ``NAME.weight`` lie ``.weight_packed`` (int32[out, in * bits / 32], neighbours of a row in a word, half
the range added), ``.weight_scale`` (floating[out, groups]), ``.weight_shape``, without symmetry ``.weight_zero_point``
(int32[out * bits / 32, groups], neighbours of a column, half the range added), and ``.weight_g_idx`` (int32[in]).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.quant import groups, words
from jaxft.quant.groups import IntGroups
from jaxft.quant.words import Found

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
OTHER = ("kv_cache_scheme", "sparsity_config", "transform_config")


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why weights of this ``quantization_config`` cannot be read; None if they can."""
    what = "weights quantised with compressed-tensors"
    if config.get("format") != "pack-quantized":
        return f"{what} in the {config.get('format')} format"
    for field in OTHER:
        if config.get(field):
            return f"{what} with a {field}"
    for scheme in config.get("config_groups", {}).values():
        weights = scheme.get("weights") or {}
        if weights.get("num_bits") not in (4, 8) or weights.get("type", "int") != "int":
            return f"{what} to {weights.get('num_bits')} bits of {weights.get('type', 'int')}"
        if scheme.get("input_activations") or scheme.get("output_activations"):
            return f"{what} and activations quantised with them"
    return None


def shape(sizes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], found: Found) -> tuple[int, ...]:
    """[out, in] of the matrix, as it says itself."""
    del sizes, config
    if "weight_shape" not in found:
        raise ValueError("weight_shape: missing; expected it beside weight_packed. Fetch the file again.")
    return tuple(int(n) for n in np.asarray(found["weight_shape"]).reshape(-1))


def weight(found: Found, config: Mapping[str, Any], dtype: str) -> IntGroups:
    """The matrix that compressed-tensors stored. ``dtype``: of its dense form. Raises ValueError naming the tensor that
    is missing or does not fit."""
    columns, rows = shape({}, config, found)
    packed = words.part(found, "weight_packed")
    bits = next((b for b in (4, 8) if packed.shape == (columns, rows * b // 32) and rows * b % 32 == 0), None)
    if bits is None:
        raise ValueError(f"weight_packed: got shape {list(packed.shape)}; expected 4 or 8 bits of {[columns, rows]}")
    scale = words.floats(found, "weight_scale")
    if scale.ndim != 2 or scale.shape[0] != columns:
        raise ValueError(f"weight_scale: got shape {list(scale.shape)}; expected [{columns}, groups]")
    count = scale.shape[1]
    zero = np.full((columns, count), 2 ** (bits - 1), np.uint8)
    if "weight_zero_point" in found:
        zero = words.unpacked(words.part(found, "weight_zero_point", (columns * bits // 32, count)), bits, 0)
    index = np.arange(rows) // groups.size_of(rows, rows // count)
    given = words.part(found, "weight_g_idx", (rows,)) if "weight_g_idx" in found else None
    if given is not None and not (given == -1).all():  # -1: not in order of activation
        index = words.groups_of(given, count, "weight_g_idx")
    codes, scale, zero = (np.ascontiguousarray(a.T) for a in (words.unpacked(packed, bits, 1), scale, zero))
    return groups.stored(codes, scale, zero, index.astype(np.int32), bits, dtype)
