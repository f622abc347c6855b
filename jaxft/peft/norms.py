"""Norm tuning: the scales (and biases) of norms train, and nothing else.

.. math:: y = \\gamma \\odot \\hat{x} + \\beta, \\qquad \\gamma, \\beta \\text{ trained}

Zhao et al. 2024, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", section 3.1
(arXiv:2312.11420); peft's LN_TUNING: ``M.ln_tuning_layers.weight`` (and ``.bias``). A norm over d features trains d
parameters, 2 d with a bias.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import InPlace, Weight
from jaxft.peft import formats, targets, whole, whole_hf
from jaxft.peft.disk import Tensors
from jaxft.peft.formats import Alone, Fields

SUFFIX = "ln_tuning_layers"


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Norm tuning. Default learning rate 1e-3."""

    targets: str | tuple[str, ...] | None = None
    """Norms to train: torch names (input_layernorm, ...), our paths, or a full-match regex; default: all."""
    exclude: str | tuple[str, ...] = ()
    """Norms never trained: names, or a full-match regex."""
    layers: tuple[int, ...] | None = None
    """Layer indices to train; default: all, and the norms outside of layers."""


def adapt(params: tree.Params, names: Names, key: jax.Array, config: Norms) -> tree.Params:
    """Trains the norms that ``config`` selects. Raises ValueError for targets that match nothing."""
    del key
    chosen = ".*" if config.targets is None else config.targets
    num_layers = tree.num_layers(params)
    for target in targets.find(
        names, num_layers, chosen, exclude=config.exclude, layers=config.layers, kinds=("norm",)
    ):
        params = whole.wrap(params, target.name, False, target.layers if target.name.stacked else None)
    return params


def export(params: tree.Params, names: Names, num_layers: int) -> tuple[Fields, Tensors, list[Weight]]:
    """peft's fields and tensors of the norms that train with all their vectors."""
    chosen: dict[str, np.ndarray] = {}
    tensors: Tensors = {}
    written: list[Weight] = []
    for name in names:
        vectors = tree.get(params, name.path) if name.kind == "norm" else {}
        trained = [_layers(vector, name) for vector in vectors.values() if isinstance(vector, InPlace)]
        if not trained or len(trained) < len(vectors) or any((hits != trained[0]).any() for hits in trained):
            continue
        chosen[name.path] = trained[0]
        arrays = {f"{SUFFIX}.{whole_hf.NORM[field]}": vector.value for field, vector in vectors.items()}
        tensors |= whole_hf.layers(name, arrays, num_layers)
        written += vectors.values()
    if not chosen:
        return {}, {}, []
    modules, _ = targets.describe(chosen, names, num_layers, by_index=False, kinds=("norm",))
    return {"target_modules": modules}, tensors, written


def _layers(vector: InPlace, name: Name) -> np.ndarray:
    """The layers that train: bool[L], bool[] of a norm that stands alone."""
    if tree.is_split(vector.value):
        return np.array([part is not None for part in vector.value.parts])
    return np.ones(vector.shape[:1] if name.stacked else (), bool)


def restore(where: object, config: Fields, tensors: Tensors, params: tree.Params, names: Names) -> tree.Params:
    """The norms that have tensors, trained. Raises AdapterError where they are not those that the config selects."""
    num_layers = tree.num_layers(params)
    used: set[str] = set()
    for name in names:
        modules = name.modules(num_layers)
        held = np.array([f"{m}.{SUFFIX}.weight" in tensors for m in modules])
        if name.kind != "norm" or not held.any():
            continue
        used.update(m for m, hit in zip(modules, held, strict=True) if hit)
        params = whole.wrap(params, name, False, held if name.stacked else None)
        vectors: dict[str, Any] = {
            field: whole_hf.fill(where, tensors, name, f"{SUFFIX}.{whole_hf.NORM[field]}", vector)
            for field, vector in tree.get(params, name.path).items()
        }
        params = tree.replace(params, name.path, vectors)
    formats.refuse_other_targets(where, config, names, num_layers, used, kinds=("norm",))
    return params


FORMAT = Alone(peft_type="LN_TUNING", fields=("target_modules", "exclude_modules"), export=export, restore=restore)
