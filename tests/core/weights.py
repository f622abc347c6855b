"""The table of every Weight there is: a new one enters the conformance tests by a row in a module of `tests.core.rows`.

A method that wraps linear layers has a row with its defaults unasked; its module adds the settings that matter.
"""

import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp

from jaxft import peft
from jaxft.core import tree, verbs
from jaxft.core.weight import Untied, Weight
from tests.core import rows
from tests.core.rows.build import IN, LAYERS, OUT, Row, adapted, matrix

__all__ = ["IN", "LAYERS", "OUT", "ROWS", "Row", "matrix", "split", "trained"]


def _rows() -> dict[str, Row]:
    modules = [importlib.import_module(f"{rows.__name__}.{m.name}") for m in pkgutil.iter_modules(rows.__path__)]
    found = {name: row for module in modules for name, row in getattr(module, "ROWS", {}).items()}
    for name, method in peft.METHODS.items():
        if issubclass(method.config, peft.Targeted) and name not in found:
            found[name] = Row(adapted(matrix, dataclasses.replace(method.config(), targets=("w",))))
    return found


ROWS = _rows()


def trained(w: Weight, key: jax.Array, steps: int = 2) -> Weight:
    """The weight after some steps of sign descent on a random target: off its initialisation, its invariants kept."""
    if not any(jax.tree.leaves(_mask(w))):
        return w
    trainable, frozen = tree.partition(w, _mask(w))
    x = jax.random.normal(key, (5, IN)).astype(w.dtype)
    features = jax.random.normal(jax.random.fold_in(key, 2), (5, OUT)).astype(w.dtype)
    target = jax.random.normal(jax.random.fold_in(key, 1), (LAYERS, 5, OUT))

    @jax.jit
    @jax.grad
    def gradient(trainable):
        whole = tree.combine(trainable, frozen)
        y = jax.vmap(lambda w: x @ w)(whole)
        loss = jnp.sum((y.astype(jnp.float32) - target) ** 2)
        if isinstance(w, Untied):  # only the look-up is a product: its head must move as well
            loss += jnp.sum(jnp.sin(jax.vmap(lambda w: verbs.unembed(w, features))(whole).astype(jnp.float32)))
        return loss

    for _ in range(steps):
        trainable = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), trainable, gradient(trainable))
    return tree.combine(trainable, frozen)


def _mask(w: Weight) -> Weight:
    try:
        return tree.trainable_mask(w)
    except ValueError:
        return jax.tree.map(lambda _: False, w)


def split(w: Weight) -> tuple[Weight, Weight]:
    """The weight's (trainable, frozen) parts; nothing trains in the model's own weights."""
    return tree.partition(w, _mask(w))
