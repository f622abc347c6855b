"""Biases that a model's own config does not have: its family's switches for them, turned on.

Training can add a bias to a linear layer (`peft.BitFit`). `transformers` gives such a layer a bias only by a field of
config.json, and then all the layers that the field stands for; those without a trained one get zeros.
"""

from typing import Any

import jax.numpy as jnp

from jaxft.checkpoint.errors import CheckpointError, some
from jaxft.checkpoint.hf import Loaded
from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.core.weight import Affine
from jaxft.models import families

SWITCHES = (("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias"))


def switched_on(model: Loaded) -> Loaded:
    """The model with a config that has every bias of its parameters, which gain what else that config has.

    Raises CheckpointError naming a bias that the family has no switch for."""
    held = {path for path, w in tree.paths(model.params, inside=False) if isinstance(w, Affine)}
    if held <= _biased(model.names):
        return model
    for fields in SWITCHES:
        raw: dict[str, Any] = {**model.raw, **dict.fromkeys(fields, True)}
        try:
            config, names = families.read(raw)
        except ValueError:  # the family does not have that field
            continue
        if held <= _biased(names):
            return Loaded(config, names, _completed(model.params, _biased(names) - held), raw)
    modules = [name.module for name in model.names if name.path in held - _biased(model.names)]
    remedy = "Keep them as an adapter (jaxft.save_adapter), or train only biases that the model has (peft.targets)."
    expected = f"biases that a config of {model.config.family} can switch on"
    raise CheckpointError(some(modules), "a bias", expected, remedy)


def _biased(names: Names) -> set[str]:
    return {name.path for name in names if name.bias and name.kind != "norm"}


def _completed(params: tree.Params, missing: set[str]) -> tree.Params:
    for path in sorted(missing):
        w = tree.get(params, path)
        params = tree.replace(params, path, Affine(w, jnp.zeros((*w.shape[:-2], w.shape[-1]), w.dtype)))
    return params
