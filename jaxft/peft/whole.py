"""Modules and biases trained whole, alone (`BitFit`, `Norms`, `LastLayers`) or beside an adapter (``modules_to_save``).

Each array becomes `InPlace`: a trained float32 copy beside its frozen original, so that `strip` still gives the model
without the adapter back. A bias trains with its matrix, and a norm with all its vectors. Of a stack some layers may be
left out (``layers`` bool[L]): they have no copy.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Affine, InPlace, Split, Untied, Weight, plain
from jaxft.peft import places, targets


def adapt(params: tree.Params, names: Names, num_layers: int, modules: Sequence[str], tied: bool) -> tree.Params:
    """Trains every weight of ``modules``; ``tied``: a tied head follows a trained embedding."""
    for name in targets.find_whole(places.rows(names), num_layers, modules) if modules else ():
        params = wrap(params, name, tied)
    return params


def wrap(params: tree.Params, name: Name, tied: bool, layers: np.ndarray | None = None) -> tree.Params:
    """Trains the weight (and bias) of one row, or the vectors of a norm; under adapters that are there already."""
    if places.is_tied_head(params, name):
        follows = tied and isinstance(places.get(params, _TOKENS), InPlace)
        return params if follows else places.wrap_head(params, lambda w: in_place(w, True))
    old = tree.get(params, name.path)
    if name.kind == "norm":
        return tree.replace(params, name.path, {field: in_place(v, None, layers) for field, v in old.items()})
    follows = places.head_follows(params, name, tied)
    if isinstance(old, Untied):
        return tree.wrap(params, name.path, lambda w: in_place(w, follows))

    def under(w: Any) -> Any:
        outer: Any = w
        return dataclasses.replace(outer, base=under(w.base)) if _adapts(w) else in_place(w, follows, layers)

    return tree.replace(params, name.path, under(old))


def with_score(params: tree.Params, names: Names, patterns: Sequence[str]) -> tree.Params:
    """Trains the head of a model that scores sequences, as peft does with every method: whole, unless it trains already
    or one of the ``patterns`` of arrays that do is found in its path."""
    found = [name for name in names if name.path == places.SCORE]
    if not found or any(re.search(pattern, places.SCORE) for pattern in patterns):
        return params
    return params if held(params, found[0]) else wrap(params, found[0], False)


def adapt_biases(params: tree.Params, names: Names, which: str, found: Sequence[targets.Target]) -> tree.Params:
    """Trains biases: ``all`` that the model has, or (``lora_only``) those of the adapted layers ``found``; what
    is trained whole has its own already."""
    layers = {name.path: None for name in names} if which == "all" else {t.name.path: t.layers for t in found}
    for name in names:
        if name.bias and name.path in layers and not held(params, name):
            params = wrap_bias(params, name, layers[name.path])
    return params


def held(params: tree.Params, name: Name) -> list[InPlace]:
    """The weight of a row, or the vectors of a norm, where it is trained whole in every layer; else nothing."""
    w = places.get(params, name)
    these = list(w.values()) if isinstance(w, dict) else [w]
    return these if all(map(_whole, these)) else []


def _whole(w: Any) -> bool:
    return isinstance(w, InPlace) and not any(map(tree.is_split, jax.tree.leaves(w.value, is_leaf=tree.is_split)))


def wrap_bias(params: tree.Params, name: Name, layers: np.ndarray | None = None) -> tree.Params:
    """Trains the bias of one row, of a stack only in ``layers``, if given."""
    old = tree.get(params, name.path)
    if name.kind == "norm":
        return tree.replace(params, name.path, {**old, "bias": in_place(old["bias"], None, layers)})

    def under(w: Any) -> Any:
        if isinstance(w, Affine) and not w.adapter:
            return dataclasses.replace(w, bias=in_place(w.bias, None, layers))
        return dataclasses.replace(w, base=under(w.base))

    return tree.replace(params, name.path, under(old))


def in_place(w: Any, tied: bool | None = None, layers: np.ndarray | None = None) -> InPlace:
    """The weight trained whole, in float32, beside its frozen original; of a stack only in ``layers``, if given."""
    held = _copy if layers is None or np.all(layers) else functools.partial(_parts, layers)
    value = jax.tree.map(held, plain(w))
    return InPlace(base=w, value=value, tied=tied)


_TOKENS = Name(places.TOKENS, "", "embedding")


def _adapts(w: Any) -> bool:
    return isinstance(w, Weight) and w.adapter


def _parts(layers: np.ndarray, x: jax.Array) -> Split:
    return Split(tuple(_copy(x[i]) if hit else None for i, hit in enumerate(layers)))


def _copy(x: jax.Array) -> jax.Array:
    # `+ 0` makes a buffer of its own: the trained copy is donated to the step, the original is not.
    return x.astype(jnp.float32) + 0
