"""Modules trained whole beside an adapter: peft's ``modules_to_save``.

Each array becomes `InPlace`: a trained float32 copy beside its frozen original, so that `strip` still gives the model
without the adapter back. A bias trains with its matrix, and a norm with all its vectors.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree, verbs
from jaxft.core.names import Name, Names
from jaxft.core.weight import Affine, InPlace
from jaxft.peft import targets


def adapt(params: tree.Params, names: Names, num_layers: int, modules: Sequence[str], tied: bool) -> tree.Params:
    """Wraps every weight of ``modules`` in `InPlace`; ``tied``: a tied head follows a trained embedding."""
    for name in targets.find_whole(names, num_layers, modules) if modules else ():
        params = wrap(params, name, tied)
    return params


def wrap(params: tree.Params, name: Name, tied: bool) -> tree.Params:
    """Wraps the weight of one row, or the vectors of a norm."""
    old = tree.get(params, name.path)
    if name.kind == "norm":
        return tree.replace(params, name.path, {field: in_place(vector) for field, vector in old.items()})
    return tree.replace(params, name.path, in_place(old, head_follows(params, name, tied)))


def head_follows(params: tree.Params, name: Name, ensure_weight_tying: bool) -> bool | None:
    """Whether a head tied to this weight follows what is trained; None if no head is tied to it."""
    return ensure_weight_tying if name.path == "embed/tokens" and "head" not in params else None


def in_place(w: Any, tied: bool | None = None) -> InPlace:
    """The weight trained whole, in float32, beside its frozen original."""
    return InPlace(base=w, value=jax.tree.map(_copy, _plain(w)), tied=tied)


def _plain(w: Any) -> Any:
    """The weight without compression: an array, or an Affine of arrays."""
    return Affine(verbs.dense(w.base), w.bias) if isinstance(w, Affine) else verbs.dense(w)


def _copy(x: jax.Array) -> jax.Array:
    # `+ 0` makes a buffer of its own: the trained copy is donated to the step, the original is not.
    return x.astype(jnp.float32) + 0
