"""Adapters of a Flax model on disk: a directory in jaxft's own format, each array under the path of its parameter."""

import os
from pathlib import Path
from typing import Any

from jaxft.core import tree
from jaxft.flax import kernel as kernels
from jaxft.flax.kernel import Kernel
from jaxft.peft import disk, native

README = "An adapter of a Flax model: jaxft.flax's `load` puts it on that model again. How it was made is not needed.\n"


def save(params: dict[str, Any], directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Writes the adapters among ``params`` (by path), without what they adapt; the directory appears whole or not.

    Raises AdapterError where there is something already (unless ``overwrite``), and without an adapter."""
    target = Path(directory).expanduser().absolute()
    disk.refuse_occupied(target, overwrite)
    bare = {p: kernels.on(w, kernels.original(w)) if isinstance(w, Kernel) else w for p, w in params.items()}
    config, tensors = native.export(target, tree.dropout_keys(_nested(bare), None), set(), ())
    disk.write(target, config, tensors, README)
    return target


def load(params: dict[str, Any], directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Plain ``params`` (by path) with saved adapters on them, their buffers shared.

    Raises AdapterError naming what is missing, left over or of another shape."""
    where = Path(directory).expanduser().absolute()
    config, tensors = disk.read(where)
    if config.get("peft_type") != native.PEFT_TYPE:
        raise disk.AdapterError(where, f"peft_type {config.get('peft_type')!r}", native.PEFT_TYPE)
    found = dict(tree.paths(native.restore(where, config, tensors, _nested(params)), inside=False))
    if tensors:
        raise disk.AdapterError(where, f"unused tensors {disk.some(sorted(tensors))}", "only those of this adapter")
    return {path: kernels.settled(w) if isinstance(w, Kernel) else w for path, w in found.items()}


def _nested(params: dict[str, Any]) -> tree.Params:
    """Parameters by path as dicts of dicts."""
    result: tree.Params = {}
    for path, w in params.items():
        *folders, last = path.split("/")
        here = result
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = w
    return result
