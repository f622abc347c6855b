"""Four-bit matrices as bitsandbytes stores them: one layer to named tensors, and back without requantising.

Beside ``NAME.weight`` (uint8[n/2, 1], neighbours of the flattened [out, in] in a byte, the first in the high bits) lie
``.absmax``, ``.quant_map``, with double quantisation ``.nested_absmax`` and ``.nested_quant_map``, and a JSON text as
bytes in ``.quant_state.bitsandbytes__nf4`` (or ``__fp4``).
"""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.quant import blockwise
from jaxft.quant.codebooks import dynamic, four_bit
from jaxft.quant.four_bit import KINDS, FourBit

STATE = ".quant_state.bitsandbytes__"
LENGTH = 256
"""Bytes of the quant state we write: JSON, filled up with spaces, so that its size is known before its numbers are."""


def tensors(w: FourBit, name: str = "weight") -> dict[str, np.ndarray]:
    """The tensors of one matrix (no stack), under ``name`` and its suffixes."""
    if len(w.shape) != 2:
        raise ValueError(f"bitsandbytes.tensors: got {list(w.shape)}; expected one matrix: index the layer first")
    rows, columns = w.shape
    high, low = np.asarray(w.codes) >> 4, np.asarray(w.codes) & 15
    both = np.stack([high, low]).reshape(2, -1, w.block // 2, columns)  # [half, block, in half, out]
    flat = both.transpose(3, 1, 0, 2).reshape(-1, 2)
    scales = np.ascontiguousarray(np.asarray(w.absmax).T).reshape(-1)
    state: dict[str, Any] = {
        "quant_type": w.kind, "blocksize": w.block, "dtype": w.made_from, "shape": [columns, rows],
    }  # fmt: skip
    found = {
        name: (flat[:, :1] << 4) | flat[:, 1:],
        f"{name}.absmax": scales,
        f"{name}.quant_map": four_bit(w.kind).values,
    }
    if w.nested is not None:
        state |= {"nested_blocksize": blockwise.NESTED, "nested_dtype": "float32", "nested_offset": float(w.offset)}
        found |= {f"{name}.nested_absmax": np.asarray(w.nested), f"{name}.nested_quant_map": dynamic().values}
    found[f"{name}{STATE}{w.kind}"] = np.frombuffer(json.dumps(state).encode().ljust(LENGTH), np.uint8)
    return found


def described(w: FourBit, name: str = "weight") -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """(dtype, shape) of each of `tensors` of one matrix; nothing is computed."""
    rows, columns = w.shape
    blocks = rows // w.block * columns
    nested = w.nested is not None
    found = {
        name: (np.uint8, (rows * columns // 2, 1)),
        f"{name}.absmax": (np.uint8 if nested else np.float32, (blocks,)),
        f"{name}.quant_map": (np.float32, (16,)),
    }
    if nested:
        found |= {
            f"{name}.nested_absmax": (np.float32, (-(-blocks // blockwise.NESTED),)),
            f"{name}.nested_quant_map": (np.float32, (blockwise.NESTED,)),
        }
    found[f"{name}{STATE}{w.kind}"] = (np.uint8, (LENGTH,))
    return {key: (np.dtype(dtype), shape) for key, (dtype, shape) in found.items()}


def weight(found: Mapping[str, np.ndarray], name: str = "weight") -> FourBit:
    """The matrix that `tensors` (or bitsandbytes) stored: the very same codes and scales.

    Raises ValueError naming the tensor where the state is not understood or does not fit."""
    kind, state = _state(found, name)
    columns, rows = state["shape"]
    block, half = state["blocksize"], state["blocksize"] // 2
    if block % 2 or rows % block:
        raise ValueError(
            f"{name}: got blocks of {block} across rows of {rows} numbers; expected blocks that divide them, the only "
            "kind jaxft keeps packed. Load the checkpoint it was made from instead."
        )
    n = rows * columns
    packed = _sized(found, name, n // 2).view(np.uint8)
    flat = np.stack([packed >> 4, packed & 15], axis=-1).reshape(columns, rows // block, 2, half)
    high, low = flat.transpose(2, 1, 3, 0).reshape(2, rows // 2, columns)
    nested, offset = None, None
    if "nested_offset" in state or f"{name}.nested_absmax" in found:
        if state.get("nested_blocksize") != blockwise.NESTED:
            raise ValueError(
                f"{name}: got nested blocks of {state.get('nested_blocksize')}; expected {blockwise.NESTED}"
            )
        _same(found, f"{name}.nested_quant_map", dynamic().values)
        nested = jnp.asarray(_scales(found, f"{name}.nested_absmax", -(-n // block // blockwise.NESTED)))
        offset = jnp.float32(_offset(state, name))
        absmax = _sized(found, f"{name}.absmax", n // block)
        if absmax.dtype != np.uint8:
            raise ValueError(f"{name}.absmax: got {absmax.dtype}; expected uint8 beside a nested_absmax")
    else:
        absmax = _scales(found, f"{name}.absmax", n // block)
    absmax = jnp.asarray(absmax.reshape(columns, rows // block).T)
    made = (jnp.asarray((high << 4) | low), absmax, nested, offset)
    return FourBit(*made, kind=kind, block=block, made_from=state["dtype"])


def _state(found: Mapping[str, np.ndarray], name: str) -> tuple[str, dict[str, Any]]:
    """(kind, quant state) of a tensor, verified. Raises ValueError."""
    kinds = [key.removeprefix(name + STATE) for key in found if key.startswith(name + STATE)]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise ValueError(f"{name}: got quant states {kinds or 'none'}; expected one of {', '.join(KINDS)}")
    (kind,) = kinds
    where = f"{name}{STATE}{kind}"
    try:
        state = json.loads(bytes(np.asarray(found[where], np.uint8)))
        sizes = [state["blocksize"], *state["shape"]]
        sound = state["quant_type"] == kind and len(sizes) == 3 and all(isinstance(s, int) and s > 0 for s in sizes)
        sound = sound and state["dtype"] in ("float32", "float16", "bfloat16")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: got a quant state that cannot be read ({error}). Fetch the file again.") from None
    if not sound:
        raise ValueError(f"{where}: got {state}; expected the quant state of a {kind} matrix. Fetch the file again.")
    _same(found, f"{name}.quant_map", four_bit(kind).values)
    return kind, state


def _sized(found: Mapping[str, np.ndarray], key: str, size: int) -> np.ndarray:
    """A tensor flattened. Raises ValueError if it is missing or not of that size."""
    if key not in found:
        raise ValueError(f"{key}: missing; expected it beside the quantised weight. Fetch the file again.")
    array = np.asarray(found[key])
    array = array.view(np.uint8) if key.endswith("weight") else array
    if array.size != size:
        raise ValueError(f"{key}: got {array.size} numbers; expected {size}, from the quant state's shape and blocks")
    return array.reshape(-1)


def _scales(found: Mapping[str, np.ndarray], key: str, size: int) -> np.ndarray:
    """float32[size]: largest magnitudes. Raises ValueError for what cannot be such."""
    array = _sized(found, key, size)
    if array.dtype.kind not in "fV":  # V: bfloat16
        raise ValueError(f"{key}: got {array.dtype}; expected floating scales, as the quant state tells of no others")
    array = array.astype(np.float32)
    if not np.all(np.isfinite(array) & (array >= 0)):
        raise ValueError(f"{key}: got scales that are negative or not finite. Fetch the file again.")
    return array


def _offset(state: Mapping[str, Any], name: str) -> float:
    """The mean of the scales. Raises ValueError if the quant state tells no finite number."""
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or not np.isfinite(np.float32(offset)):
        raise ValueError(
            f"{name}: got a quant state with nested_offset {offset!r}; expected the mean of the scales, as "
            f"{name}.nested_absmax is there. Fetch the file again."
        )
    return offset


def _same(found: Mapping[str, np.ndarray], key: str, values: np.ndarray) -> None:
    """Refuses a codebook that is not ours (to a rounding: some versions stored four digits of FP4's)."""
    given = _sized(found, key, len(values)).astype(np.float32)
    if not np.allclose(given, values, rtol=0, atol=1e-5):
        at = int(np.abs(given - values).argmax())
        raise ValueError(
            f"{key}: got a codebook whose entry {at} is {given[at]:g}; expected {values[at]:g}: another data type "
            "than its name says. Load the checkpoint it was made from instead."
        )
