"""Which base a training state belongs to: a short fingerprint of a model's config and of samples of its weights."""

import hashlib
import json
import math
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint import host
from jaxft.core import tree
from jaxft.core.weight import Split
from jaxft.models.fields import HARMLESS

SAMPLES = 4096  # of each array
STRIDE = 2654435761  # prime: successive samples land anywhere in the array


class Base(Protocol):
    """Anything with a config.json and parameters: a model, or a loaded checkpoint."""

    @property
    def raw(self) -> dict[str, Any]: ...

    @property
    def params(self) -> tree.Params: ...


def fingerprint(model: Base) -> str:
    """16 hexadecimal digits, the same wherever and however often this base is loaded.

    Values count in bfloat16 precision, so that a base loaded as float32 and as bfloat16 is the same one; adapters
    and fields that do not change the maths do not count."""
    digest = hashlib.sha256()
    config = {name: value for name, value in model.raw.items() if name not in HARMLESS and value is not None}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path, leaf in sorted(tree.paths(tree.strip(model.params)), key=lambda item: item[0]):
        values = _sample(leaf)
        if jnp.issubdtype(values.dtype, jnp.floating):
            values = values.astype(jnp.bfloat16)
        digest.update(f"{path} {list(leaf.shape)} {values.dtype.name}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def _sample(leaf: Any) -> np.ndarray:
    """Values at fixed places all over an array: [at most SAMPLES]."""
    size = math.prod(leaf.shape)
    places = np.arange(min(size, SAMPLES), dtype=np.int64) * STRIDE % max(size, 1)
    index = tuple(axis.astype(np.int32) for axis in np.unravel_index(places, leaf.shape))
    if not isinstance(leaf, Split):
        return _at(leaf, index)
    out = np.empty(len(places), leaf.dtype)
    for layer, part in enumerate(leaf.parts):
        here = index[0] == layer
        out[here] = _at(part, tuple(axis[here] for axis in index[1:]))
    return out


def _at(array: Any, index: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.asarray(array)[index] if host.visible(array) else host.gather(array[index])
