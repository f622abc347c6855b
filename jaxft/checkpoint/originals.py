"""The float matrices that packed weights were made from, read again from the checkpoint one layer at a time."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxft.checkpoint import reader
from jaxft.checkpoint.layout import Entry
from jaxft.checkpoint.tensorfile import Reader, Tensor
from jaxft.core.names import Name


@dataclass(frozen=True)
class Originals:
    """``originals(name, index)``: a layer's matrix [in, out] as it was before it was packed, on the default device."""

    leaves: Mapping[str, tuple[Entry, tuple[Tensor, ...]]]
    """By path, each array of the tree and its tensors on disk."""
    dtype: Any
    """That the model was loaded in."""

    def __call__(self, name: Name, index: tuple[int, ...]) -> jax.Array:
        entry, tensors = self.leaves[f"{name.path}/base" if name.bias else name.path]
        one = dataclasses.replace(entry, shape=entry.shape[-2:], stacked=False)
        with Reader() as files:
            return reader.read(files, one, [tensors[index[0] if index else 0]], self.dtype, None)
