"""Adapters of a Flax model on disk: a directory with every array of them under its path, in one safetensors file."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.flax.kernel import Kernel, original, rebased
from jaxft.peft import disk

FORMAT = "jaxft.flax"


def save(params: dict[str, Any], directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Writes the adapters among ``params`` (by path), without what they adapt; the directory appears whole or not.

    Raises AdapterError where something is there already (unless ``overwrite``), ValueError without an adapter."""
    target, tensors = Path(directory), {}
    disk.refuse_occupied(target, overwrite)
    for path, kernel in _adapted(params).items():
        tensors |= {f"/{path}/{name}": disk.host(array) for name, array in tree.paths(rebased(kernel, None))}
    about = "An adapter of a Flax model: jaxft.flax's load puts it into the same model, adapted in the same way.\n"
    disk.write(target, {"format": FORMAT, "parameters": sorted(_adapted(params))}, tensors, about)
    return target


def load(params: dict[str, Any], directory: str | os.PathLike[str]) -> dict[str, Any]:
    """``params`` (by path), adapted as they were when saved, with the arrays that were saved.

    Raises AdapterError naming an array that is missing, left over or of another shape."""
    source = Path(directory)
    config, tensors = disk.read(source)
    if config.get("format") != FORMAT:
        raise disk.AdapterError(
            source, f"format {config.get('format')!r}", f"{FORMAT!r}", "Load it with jaxft.load_adapter."
        )
    found = dict(params)
    for path, kernel in _adapted(params).items():
        hollow = rebased(kernel, None)
        arrays = [_take(source, tensors, f"/{path}/{name}", array) for name, array in tree.paths(hollow)]
        found[path] = rebased(jax.tree.unflatten(jax.tree.structure(hollow), arrays), original(kernel))
    if tensors:
        left = disk.some(sorted(name.lstrip("/") for name in tensors))
        raise disk.AdapterError(
            source, f"also {left}", "the arrays of this model's adapters", "Adapt it as it was when saved."
        )
    return found


def _adapted(params: dict[str, Any]) -> dict[str, Kernel]:
    found = {path: w for path, w in params.items() if isinstance(w, Kernel)}
    if not found:
        raise ValueError("the model holds no adapter; expected one that jaxft.flax's adapt has adapted")
    return found


def _take(source: Path, tensors: disk.Tensors, name: str, like: jax.Array) -> jax.Array:
    array = tensors.pop(name, None)
    if array is None or array.shape != like.shape:
        got = "nothing" if array is None else f"shape {list(array.shape)}"
        expected = f"shape {list(like.shape)}"
        raise disk.AdapterError(f"{source}: {name[1:]}", got, expected, "Adapt the model as it was when saved.")
    return jnp.asarray(array, like.dtype)
