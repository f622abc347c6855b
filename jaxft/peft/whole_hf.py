"""Modules and biases trained whole, and replaced embeddings, in peft's format.

``modules_to_save``: ``M.weight`` (and ``M.bias``) as torch holds them. Biases: ``M.bias``, or ``M.base_layer.bias``
where M is adapted. When peft adapts an embedding, or the vocabulary was resized, it also saves that module's base
weight, which then replaces the model's own.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Affine, InPlace, Split, Untied, Weight
from jaxft.peft import disk, places, targets, whole
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.trainable_tokens import TokensWeight

Fields = dict[str, Any]


def export(
    params: tree.Params, names: Names, num_layers: int, written: Sequence[Any] = ()
) -> tuple[Fields, Tensors, list[InPlace]]:
    """``modules_to_save``, its tensors, and the weights that they are of, but for those already ``written``."""
    before = set(map(id, written))
    saved: list[str] = []
    tensors: Tensors = {}
    found: list[InPlace] = []
    for name in names:
        w = places.get(params, name)
        these = whole.held(params, name)
        if not these or any(id(one) in before for one in these):
            continue
        if name.kind == "norm":
            arrays = {NORM[field]: vector.value for field, vector in w.items()}
        else:
            value = w.value
            arrays = {"weight": value.base, "bias": value.bias} if isinstance(value, Affine) else {"weight": value}
        found += these
        if arrays:
            saved.append(targets.ending(name, names, dot=""))
            tensors |= layers(name, arrays, num_layers, _transposed(params, name))
            if name.path == places.TOKENS and w.tied:  # peft stores the tied head with it
                tensors |= {f"{n.module}.weight": disk.host(w.value) for n in names if n.path == places.HEAD}
    return {"modules_to_save": saved or None}, tensors, found


NORM = {"scale": "weight", "bias": "bias"}
_WHOLE = "every module of modules_to_save"


def _transposed(params: tree.Params, name: Name) -> bool:
    """Whether torch holds the matrix the other way round; a tied head is held as torch does."""
    return name.kind == "linear" and not places.is_tied_head(params, name)


def layers(name: Name, arrays: dict[str, Any], num_layers: int, transposed: bool = False) -> Tensors:
    """Each layer's tensors: ``module.key``."""
    out: Tensors = {}
    for key, stack in arrays.items():
        parts = stack.parts if tree.is_split(stack) else disk.host(stack) if name.stacked else [stack]
        for module, part in zip(name.modules(num_layers), parts, strict=True):
            if part is not None:
                array = disk.host(part)
                out[f"{module}.{key}"] = array.T if transposed and key == "weight" else array
    return out


def export_biases(
    where: object, params: tree.Params, names: Names, num_layers: int, found: dict[str, Any]
) -> tuple[Fields, Tensors, list[InPlace]]:
    """``bias``, its tensors, and the biases that they are of; ``found``: the adapters by path.

    Raises AdapterError for a choice peft has no word for."""
    rows = [n for n in names if n.bias and not whole.held(params, n)]
    biased = {module for n in rows for module in n.modules(num_layers)}
    wrapped = {
        m for n in rows if n.path in found for m in targets.adapted(n, num_layers, disk.host(found[n.path].adapted))
    }
    trained: set[str] = set()
    tensors: Tensors = {}
    written: list[InPlace] = []
    for name in rows:
        w = tree.get(params, name.path)
        bias = w["bias"] if isinstance(w, dict) else w.bias if isinstance(w, Affine) else None
        if isinstance(bias, InPlace):
            written.append(bias)
            for key, array in layers(name, {"bias": bias.value}, num_layers).items():
                module = key.removesuffix(".bias")
                trained.add(module)
                tensors[f"{module}.base_layer.bias" if module in wrapped else key] = array
    if not trained:
        return {}, tensors, written  # not every config has the field
    for word, modules in (("lora_only", wrapped), ("all", biased)):
        if trained == modules:
            return {"bias": word}, tensors, written
    expected = "all of the model's biases or those of the adapted modules"
    raise AdapterError(where, f"trained biases of {disk.some(sorted(trained))}", expected)


def export_bases(params: tree.Params, names: Names, changed: list[Any], peft_type: str) -> tuple[Tensors, list[Any]]:
    """The embedding and the head's own matrix, if among the ``changed`` arrays of the model itself: peft's format can
    carry them along. Their tensors, and the arrays."""
    tensors: Tensors = {}
    held: list[Any] = []
    for name in names:
        w: Any = places.get(params, name) if name.path in (places.TOKENS, places.HEAD) else None
        inner = w
        while isinstance(inner, Weight):
            inner = inner.base
        if not any(inner is a for a in changed) or isinstance(w, InPlace):
            continue
        beside = "token_adapter." if isinstance(w, TokensWeight) and peft_type == "LORA" else ""
        array = disk.host(inner)
        transposed = _transposed(params, name)
        tensors[f"{name.module}.{beside}{'base_layer.' if inner is not w else ''}weight"] = (
            array.T if transposed else array
        )
        held.append(inner)
    return tensors, held


def replace_bases(
    where: object, config: Fields, tensors: Tensors, params: tree.Params, names: Names, saved: list[Name]
) -> tree.Params:
    """Puts base weights that were saved with the adapter, and are not trained whole, in the model's place."""
    follows = config.get("ensure_weight_tying") and places.HEAD not in params
    for name in names:
        if name in saved or not (name.kind == "embedding" or name.path == places.HEAD):
            continue
        for infix in ("base_layer.", "", "token_adapter.base_layer."):
            key = f"{name.module}.{infix}weight"
            array = tensors.pop(key, None)
            if array is not None and not (follows and name.path == places.HEAD):  # peft stores a head that follows too
                params = _replace_base(where, key, array, params, name)
    return params


def _replace_base(where: object, key: str, array: np.ndarray, params: tree.Params, name: Name) -> tree.Params:
    tied = places.is_tied_head(params, name)
    old = tree.get(params, places.TOKENS if tied else name.path)
    array = array.T if _transposed(params, name) else array
    if array.shape != tuple(old.shape):
        remedy = "The vocabulary was resized before training: load a base model with that many rows."
        raise AdapterError(f"{where}: {key}", f"shape {list(array.shape)}", f"{list(old.shape)}", remedy)
    new = jnp.asarray(array).astype(old.dtype)
    if not isinstance(old, Weight) and bool(jnp.array_equal(new, old)):
        return params
    if tied:
        return tree.replace(params, places.TOKENS, Untied(old, new))
    return tree.replace(params, name.path, new)


def drop_copies(config: Fields, tensors: Tensors, saved: list[Name], num_layers: int) -> None:
    """Takes out what peft, where all biases train, stores besides the ``M.bias`` of ``saved`` modules: the same bias
    by its name in the wrapper, and the model's own, which nothing uses."""
    if config.get("bias") != "all":
        return
    own = {f"{module}.bias" for name in saved for module in name.modules(num_layers)}
    for key in list(tensors):
        found = {re.sub(rf"\.{wrapper}(?=\.)", "", key, count=1) for wrapper in WRAPPERS} - {key}
        if found & own:
            del tensors[key]


WRAPPERS = ("original_module", "modules_to_save", r"modules_to_save\.[^.]+")


def restore(where: object, config: Fields, tensors: Tensors, params: tree.Params, saved: list[Name]) -> tree.Params:
    """Trains the modules of ``saved`` whole, from their tensors."""
    tying = bool(config.get("ensure_weight_tying"))
    for name in saved:
        params = whole.wrap(params, name, tying)
        w = places.get(params, name)
        if name.kind == "norm":
            filled = {field: fill(where, tensors, name, NORM[field], vector) for field, vector in w.items()}
            params = tree.replace(params, name.path, filled)
        elif isinstance(w, InPlace):  # else a tied head that follows the embedding
            params = places.put(params, name, _filled_module(where, tensors, params, name, w))
        else:
            tensors.pop(f"{name.module}.weight", None)
    return params


def restore_biases(where: object, config: Fields, tensors: Tensors, params: tree.Params, names: Names) -> tree.Params:
    """Trains the biases that have tensors, if the config says so."""
    if config.get("bias", "none") == "none":
        return params
    num_layers = tree.num_layers(params)
    for name in names:
        modules = name.modules(num_layers)
        held = {m: key for m in modules for key in (f"{m}.base_layer.bias", f"{m}.bias") if key in tensors}
        if not name.bias or not held:
            continue
        params = whole.wrap_bias(params, name, np.array([module in held for module in modules]))
        w = tree.get(params, name.path)
        bias = fill(where, tensors, name, "bias", w["bias"] if isinstance(w, dict) else w.bias, keys=held)
        filled = {**w, "bias": bias} if isinstance(w, dict) else dataclasses.replace(w, bias=bias)
        params = tree.replace(params, name.path, filled)
    return params


def _filled_module(where: object, tensors: Tensors, params: tree.Params, name: Name, w: InPlace) -> InPlace:
    transposed = _transposed(params, name)
    if not isinstance(w.value, Affine):
        return fill(where, tensors, name, "weight", w, transposed)
    matrix = fill(where, tensors, name, "weight", InPlace(w.base.base, w.value.base), transposed).value
    bias = fill(where, tensors, name, "bias", InPlace(w.base.bias, w.value.bias)).value
    return dataclasses.replace(w, value=Affine(matrix, bias))


def fill(
    where: object,
    tensors: Tensors,
    name: Name,
    key: str,
    w: InPlace,
    transposed: bool = False,
    keys: Mapping[str, str] | None = None,
) -> InPlace:
    """The weight with its trained value read, layer by layer; ``keys``: of each module, where not ``module.key``."""
    shape = w.value.shape[1:] if name.stacked else w.value.shape
    size = shape[::-1] if transposed else shape

    def read(module: str) -> np.ndarray:
        array = disk.take(where, tensors, (keys or {}).get(module, f"{module}.{key}"), size, _WHOLE)
        return array.T if transposed else array

    modules = name.modules(w.value.shape[0])
    if tree.is_split(w.value):
        parts = zip(modules, w.value.parts, strict=True)
        return dataclasses.replace(
            w, value=Split(tuple(None if part is None else jnp.asarray(read(m)) for m, part in parts))
        )
    return dataclasses.replace(
        w, value=jnp.asarray(np.stack(list(map(read, modules))) if name.stacked else read(modules[0]))
    )
