"""Modules and biases trained whole beside an adapter: peft's ``modules_to_save`` and ``bias``.

Each array becomes `InPlace`: a trained float32 copy beside its frozen original, so that `strip` still gives the model
without the adapter back. A bias trains with its matrix, and a norm with all its vectors.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import InPlace, Untied, plain
from jaxft.peft import places, targets


def adapt(params: tree.Params, names: Names, num_layers: int, modules: Sequence[str], tied: bool) -> tree.Params:
    """Trains every weight of ``modules``; ``tied``: a tied head follows a trained embedding."""
    for name in targets.find_whole(places.rows(names), num_layers, modules) if modules else ():
        params = wrap(params, name, tied)
    return params


def wrap(params: tree.Params, name: Name, tied: bool) -> tree.Params:
    """Trains the weight (and bias) of one row, or the vectors of a norm."""
    if places.is_tied_head(params, name):
        follows = tied and isinstance(places.get(params, _TOKENS), InPlace)
        return params if follows else places.wrap_head(params, lambda w: in_place(w, True))
    old = tree.get(params, name.path)
    if name.kind == "norm":
        return tree.replace(params, name.path, {field: in_place(vector) for field, vector in old.items()})
    if isinstance(old, Untied):
        return tree.wrap(params, name.path, in_place)
    return tree.replace(params, name.path, in_place(old, places.head_follows(params, name, tied)))


def adapt_biases(params: tree.Params, names: Names, which: str, paths: set[str]) -> tree.Params:
    """Trains biases: ``all`` that the model has, or (``lora_only``) those of the adapted weights at ``paths``."""
    for name in names:
        if name.bias and (which == "all" or name.path in paths):
            params = wrap_bias(params, name)
    return params


def wrap_bias(params: tree.Params, name: Name) -> tree.Params:
    """Trains the bias of one row."""
    old = tree.get(params, name.path)
    if name.kind == "norm":
        return tree.replace(params, name.path, {**old, "bias": in_place(old["bias"])})
    return tree.replace(params, name.path, dataclasses.replace(old, bias=in_place(old.bias)))


def in_place(w: Any, tied: bool | None = None) -> InPlace:
    """The weight trained whole, in float32, beside its frozen original."""
    return InPlace(base=w, value=jax.tree.map(_copy, plain(w)), tied=tied)


_TOKENS = Name(places.TOKENS, "", "embedding")


def _copy(x: jax.Array) -> jax.Array:
    # `+ 0` makes a buffer of its own: the trained copy is donated to the step, the original is not.
    return x.astype(jnp.float32) + 0
