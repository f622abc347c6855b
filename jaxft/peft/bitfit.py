"""BitFit: biases train, and nothing else.

.. math:: y = x W + b, \\qquad b \\text{ trained}

Ben Zaken, Ravfogel & Goldberg 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", section 3 (arXiv:2106.10199). One parameter for each output feature of each chosen module. An existing
bias trains in place (`InPlace`; beside a LoRA, peft's ``bias="all"``). Where the model has none a bias of zeros is
added, which is peft's BEFT (arXiv:2509.15974). A model with added biases can be exported where its family has a switch
for them (attention_bias, mlp_bias).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.core.weight import Affine, parameter, trainable, weight
from jaxft.peft import places, sites, targets, whole
from jaxft.peft.formats import Format
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True, kw_only=True)
class BitFit(Targeted):
    """Bias tuning. Default learning rate 1e-3."""

    targets: str | tuple[str, ...] | None = None
    """Modules whose biases train, zeros where there is none; default: all biases that the model has, or, where it has
    none, one for every linear layer."""

    outside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bias != "none":
            raise ValueError(f"peft.bias: got {self.bias!r}; expected none, as bitfit trains biases by itself")

    def wrap(self, site: Site) -> "BiasedWeight":
        bias = jnp.zeros((*site.layers.shape, site.shape[1]))
        return BiasedWeight(base=site.base, bias=bias, gate=site.gate)


@weight
class BiasedWeight(Affine):
    """``x @ base + bias`` with an added bias. bias: [*stack, out]."""

    base: Any = parameter()
    bias: jax.Array = trainable()
    gate: jax.Array
    adapter: ClassVar[bool] = True
    linear: ClassVar[tuple[str, ...]] = ("bias",)

    def _affine(self) -> Affine:
        return Affine(self.base, self.bias * self.gate[..., None])

    def __rmatmul__(self, x):
        return x @ self._affine()

    def ragged_dot(self, x, group_sizes):
        return self._affine().ragged_dot(x, group_sizes)

    def merged(self):
        added = self._affine()
        old = added.base
        if isinstance(old, Affine):
            return Affine(old.base, (old.bias.astype(jnp.float32) + added.bias).astype(old.bias.dtype))
        return dataclasses.replace(added, bias=added.bias.astype(self.dtype))

    def axes(self, names):
        return {**super().axes(names), "gate": names[:-2]}


def adapt(params: tree.Params, names: Names, key: jax.Array, config: BitFit) -> tree.Params:
    """Trains the biases that ``config`` selects. Raises ValueError for targets that match nothing."""
    num_layers = tree.num_layers(params)
    rows = tuple(
        n for n in names if (n.bias or n.kind in ("linear", "conv1d")) and n.path not in (places.HEAD, places.SCORE)
    )
    chosen = config.targets
    if chosen is None and any(name.bias for name in rows):
        rows, chosen = tuple(name for name in rows if name.bias), ".*"
    found = targets.find(
        rows,
        num_layers,
        "all-linear" if chosen is None else chosen,
        exclude=config.exclude,
        layers=config.layers,
        saved=config.modules_to_save,
        kinds=("linear", "conv1d", "norm"),
    )
    for target in found:
        if target.name.bias:
            params = whole.wrap_bias(params, target.name, target.layers if target.name.stacked else None)
        else:
            params = sites.wrap(params, config, target.name, target.layers, key)
    return whole.adapt(params, names, num_layers, config.modules_to_save, config.ensure_weight_tying)


FORMAT = Format(
    peft_type="BEFT",
    leaf=BiasedWeight,
    fields=("target_modules", "init_weights"),
    config=lambda config: BitFit(),
    describe=lambda w: {"init_weights": True},
    suffixes=("beft_bias",),
    write=lambda w: {"beft_bias": np.asarray(w.bias)[None]},
    read=lambda w, tensors: dataclasses.replace(w, bias=tensors["beft_bias"][0]),
    biases=False,
)
