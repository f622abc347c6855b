"""Matrices as AutoAWQ stores them (``quant_method: awq``, version gemm), to be read.

In the place of ``NAME.weight`` lie ``.qweight`` (int32[in, out / 8]), ``.qzeros`` (int32[groups, out / 8]) and
``.scales`` (floating[groups, out]). A word holds eight neighbours of a row, the k-th of them at four times `PLACE`[k].
The activation-aware scaling itself (Lin et al. 2023, arXiv:2306.00978) is in the weights and the norms before them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.quant import groups, words
from jaxft.quant.groups import IntGroups
from jaxft.quant.words import Found

PARTS = ("qweight", "qzeros", "scales")
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why weights of this ``quantization_config`` cannot be read; None if they can."""
    bits = config.get("bits", config.get("w_bit"))
    form = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4:
        return f"weights that AWQ quantised to {bits} bits"
    if form != "gemm":
        return f"weights quantised with AWQ in the {form} version"
    return None if config.get("zero_point", True) else "weights quantised with AWQ without zero points"


def shape(sizes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], found: Found) -> tuple[int, ...]:
    """[out, in] of the matrix that tensors of these sizes stand for."""
    del config, found
    rows, columns = sizes["qweight"]
    return columns * 8, rows


def weight(found: Found, config: Mapping[str, Any], dtype: str) -> IntGroups:
    """The matrix that AutoAWQ stored. ``dtype``: of its dense form. Raises ValueError naming the tensor that is missing
    or does not fit."""
    codes = _unpacked(words.part(found, "qweight"))
    rows, columns = codes.shape
    size = groups.size_of(rows, config.get("group_size", config.get("q_group_size", -1)))
    scale = words.floats(found, "scales", (rows // size, columns))
    zero = _unpacked(words.part(found, "qzeros", (rows // size, columns // 8)))
    return groups.stored(codes, scale, zero, None, 4, dtype)


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """int32[a, b] -> uint8[a, 8 b]."""
    numbers = words.unpacked(packed, 4, 1).reshape(*packed.shape, 8)
    return numbers[..., PLACE].reshape(packed.shape[0], -1)
