"""Small integers packed into int32 words, and the tensors of a packed matrix, verified. On the host, in numpy."""

from collections.abc import Mapping

import numpy as np

Found = Mapping[str, np.ndarray]
"""The tensors of one module, by what follows its name."""


def unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32[a, b] -> uint8: each word gives 32 / bits numbers, the lowest bits first, in its place along ``axis``."""
    byte = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(*words.shape, 4)
    numbers = byte if bits == 8 else np.stack([byte & 15, byte >> 4], axis=-1).reshape(*words.shape, 8)
    rows, columns = words.shape
    if axis == 0:
        return numbers.transpose(0, 2, 1).reshape(-1, columns)
    return numbers.reshape(rows, -1)


def packed(numbers: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """uint8[a, b] -> int32, what `unpacked` unpacks. The size along ``axis`` must be a multiple of 32 / bits."""
    per, (rows, columns) = 32 // bits, numbers.shape
    if axis == 0:
        numbers = numbers.reshape(rows // per, per, columns).transpose(0, 2, 1)
    else:
        numbers = numbers.reshape(rows, columns // per, per)
    byte = numbers if bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4
    return np.ascontiguousarray(byte).view("<i4")[..., 0]


def part(found: Found, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A tensor of int32. Raises ValueError if it is missing, of another shape or of another dtype."""
    array = _present(found, name, shape)
    if array.dtype != np.int32:
        raise ValueError(f"{name}: got {array.dtype}; expected int32")
    return array


def floats(found: Found, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A floating tensor. Raises ValueError if it is missing, of another shape or dtype, or not finite."""
    array = _present(found, name, shape)
    if array.dtype.kind not in "fV":  # V: bfloat16
        raise ValueError(f"{name}: got {array.dtype}; expected floating numbers")
    if not np.isfinite(array.astype(np.float32)).all():
        raise ValueError(f"{name}: got numbers that are not finite. Fetch the file again.")
    return array


def groups_of(index: np.ndarray, count: int, name: str) -> np.ndarray:
    """int32: the group of each row. Raises ValueError for one that does not exist."""
    if index.size and not (0 <= index.min() and index.max() < count):
        raise ValueError(f"{name}: got groups {index.min()} to {index.max()}; expected 0 to {count - 1}")
    return index.astype(np.int32)


def _present(found: Found, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    if name not in found:
        raise ValueError(f"{name}: missing; expected it beside {min(found)}. Fetch the file again.")
    array = np.asarray(found[name])
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: got shape {list(array.shape)}; expected {list(shape)}, from the tensors beside it")
    return array
