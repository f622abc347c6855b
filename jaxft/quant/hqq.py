"""Matrices as transformers stores those of HQQ (``quant_method: hqq``), to be read.

Badri and Shaji 2023, "Half-Quadratic Quantization": W = (W_q - zero) * scale with zero points that are not whole. In
the place of ``NAME.weight`` lie ``.W_q``, ``.scale``, ``.zero`` and the settings of each matrix, every one a tensor:
numbers, and texts as bytes. The matrix [out, in] is cut into rows of one group each (axis 1: groups of input features);
in four bits the first half of these rows is in the high bits of a byte, the second in the low ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.quant import groups, words
from jaxft.quant.groups import IntGroups
from jaxft.quant.words import Found

PARTS = (
    "W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "view_as_float", "unpack_view_dtype",
    "channel_wise", "optimize", "round_zero", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "zero_scale",
)  # fmt: skip


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why weights of this ``quantization_config`` cannot be read; None if that depends on the weights' own settings."""
    return None if isinstance(config.get("quant_config"), Mapping) else "weights quantised with HQQ by an old version"


def shape(sizes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], found: Found) -> tuple[int, ...]:
    """[out, in] of the matrix, as it says itself."""
    del sizes, config
    if "shape" not in found:
        raise ValueError("shape: missing; expected it beside W_q: an old version of HQQ. Quantise the original anew.")
    return tuple(int(n) for n in np.asarray(found["shape"]).reshape(-1))


def weight(found: Found, config: Mapping[str, Any], dtype: str) -> IntGroups:
    """The matrix that HQQ stored. ``dtype``: of its dense form.

    Raises ValueError naming what is missing, does not fit, or cannot be held exactly: other axes, bits and packings."""
    bits, axis = _number(found, "nbits"), _number(found, "axis")
    if axis != 1:
        raise ValueError(f"axis: got {axis}, groups of output features; expected 1, groups of input features")
    if bits not in (4, 8):
        raise ValueError(f"nbits: got {bits}; expected 4 or 8")
    for name in ("quant_scale", "quant_zero"):
        if name in found and _number(found, name):
            raise ValueError(f"{name}: got scales or zero points that are quantised; expected floating ones")
    columns, rows = shape({}, config, found)
    size = groups.size_of(rows, _number(found, "group_size") if "group_size" in found else -1)
    count = rows // size
    scale, zero = (words.floats(found, name, (columns * count, 1)) for name in ("scale", "zero"))
    codes = _bytes(found, columns * rows * bits // 8)
    if bits == 4:
        codes = np.concatenate([codes >> 4, codes & 15])
    codes, scale, zero = (np.ascontiguousarray(a.reshape(columns, -1).T) for a in (codes, scale, zero))
    return groups.stored(codes, scale, zero, None, bits, dtype)


def _number(found: Found, name: str) -> int:
    if name not in found or np.asarray(found[name]).size != 1:
        raise ValueError(f"{name}: missing; expected one number beside W_q. Fetch the file again.")
    return int(np.asarray(found[name]).reshape(-1)[0])


def _bytes(found: Found, count: int) -> np.ndarray:
    """``W_q`` as bytes, whatever dtype they are seen as in the file (``view_as_float``)."""
    codes = np.ascontiguousarray(found["W_q"]).reshape(-1).view(np.uint8)
    if codes.size != count:
        raise ValueError(f"W_q: got {codes.size} bytes; expected {count}, from shape and nbits")
    return codes
