"""Parameter-efficient methods: leaves that add few parameters, or masks over the model's own.

`METHODS` is the literal table. A method is one file: a config that inherits `Targeted` and wraps a base in the Weight
beside it, and the `Format` in which peft stores it; or a mask, or a slot, with an ``adapt`` of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxft.core import hooks as hooks_
from jaxft.core import tree
from jaxft.core.hooks import Hooks
from jaxft.peft import adalora, adalora_hf, boft, bottleneck, full, hra, ia3, lora, lora_hf, oft, road, sites, vera
from jaxft.peft.adalora import AdaLoRA
from jaxft.peft.boft import BOFT
from jaxft.peft.bottleneck import Houlsby, Parallel, Pfeiffer
from jaxft.peft.formats import Format
from jaxft.peft.full import Full
from jaxft.peft.hra import HRA
from jaxft.peft.ia3 import IA3
from jaxft.peft.lora import LoRA, LoRAWeight
from jaxft.peft.oft import OFT
from jaxft.peft.road import RoAd
from jaxft.peft.sites import Site, Targeted
from jaxft.peft.vera import VeRA


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`."""

    config: type
    lr: float
    """Default peak learning rate with AdamW."""
    adapt: Callable[..., tree.Params] = sites.adapt
    """(params, names, key, config) -> params; by default ``config.wrap`` at every weight that the config selects."""
    select: Callable[[Any], str | None] = lambda config: None
    """The pattern of plain arrays that train besides the method's own fields."""
    groups: Callable[[Any], dict[str, float]] = lambda config: {}
    """Factors of the learning rate: a regex searched in paths of trained arrays to its factor."""
    hooks: Callable[[Any, tree.Params, int], Hooks] = lambda config, params, steps: hooks_.NONE
    """(config, params, steps of the run) -> what it does in each training step besides the forward pass."""
    hf: Format | None = None
    """How it is stored in Hugging Face's format; None for a method that has no adapter of its own there."""


METHODS: dict[str, Method] = {
    "full": Method(full.Full, lr=2e-5, adapt=full.adapt, select=lambda config: config.select),
    "lora": Method(lora.LoRA, lr=2e-4, hf=lora_hf.FORMAT),
    "adalora": Method(adalora.AdaLoRA, lr=1e-3, hooks=adalora.hooks, hf=adalora_hf.FORMAT),
    "houlsby": Method(bottleneck.Houlsby, lr=3e-4),
    "pfeiffer": Method(bottleneck.Pfeiffer, lr=3e-4, adapt=bottleneck.adapt),
    "parallel": Method(bottleneck.Parallel, lr=3e-4, adapt=bottleneck.adapt),
    "vera": Method(vera.VeRA, lr=4e-3, hf=vera.FORMAT),
    "oft": Method(oft.OFT, lr=4e-4, hf=oft.FORMAT),
    "boft": Method(boft.BOFT, lr=1e-3, hf=boft.FORMAT),
    "hra": Method(hra.HRA, lr=1e-3, hf=hra.FORMAT),
    "road": Method(road.RoAd, lr=3e-3, hf=road.FORMAT),
    "ia3": Method(ia3.IA3, lr=5e-3, adapt=ia3.adapt, hf=ia3.FORMAT),
}


def method_of(config: Any) -> Method:
    """The table row of a method's config; one from outside the package needs none. Raises TypeError for no config."""
    for row in METHODS.values():
        if type(config) is row.config:
            return row
    if isinstance(config, Targeted):
        return Method(type(config), lr=config.learning_rate)
    raise TypeError(f"got {config!r}; expected one of {', '.join(m.config.__name__ for m in METHODS.values())}")


def adapt(model: Any, key: jax.Array, method: Any) -> tree.Params:
    """The model's parameters with one method, or a list of them in order, applied.

    ``model`` has ``params`` and ``names``; ``method`` is a config such as ``LoRA(rank=16)``. The base's buffers are
    shared, not copied."""
    return adapt_for_training(model, key, method if isinstance(method, list | tuple) else [method])[0]


def adapt_for_training(
    model: Any, key: jax.Array, methods: Sequence[Any]
) -> tuple[tree.Params, tree.Params, tree.Params]:
    """(parameters, mask of what trains, default learning rate of each trained array): see `adapt`.

    An array belongs to the first of the methods that trains it."""
    params, rates = model.params, dict[int, float]()
    for i, config in enumerate(methods):
        row = method_of(config)
        params = row.adapt(params, model.names, jax.random.fold_in(key, i), config)
        for leaf in _trained(params, row.select(config)):
            rates.setdefault(id(leaf), row.lr)
    patterns = [pattern for c in methods if (pattern := method_of(c).select(c)) is not None]
    patterns = [tree.PRESETS.get(pattern, pattern) for pattern in patterns]
    mask = tree.trainable_mask(params, "|".join(f"(?:{p})" for p in patterns) if patterns else None)
    last = method_of(methods[-1]).lr
    return params, mask, jax.tree.map(lambda p, m: rates.get(id(p), last) if m else None, params, mask)


def hooks(methods: Sequence[Any], params: tree.Params, steps: int) -> Hooks:
    """What the methods do in each step of a run of ``steps`` steps. Raises ValueError if several do something."""
    made = [(config, method_of(config).hooks(config, params, steps)) for config in methods]
    active = [(config, hook) for config, hook in made if hook is not hooks_.NONE]
    if len(active) > 1:
        names = ", ".join(type(config).__name__ for config, _ in active)
        raise ValueError(f"peft: {names} each change the parameters in every step; expected one such method")
    return active[0][1] if active else hooks_.NONE


def _trained(params: tree.Params, select: str | None) -> list[jax.Array]:
    """The arrays that train, as they are now; none yet where only a later method has any."""
    try:
        mask = tree.trainable_mask(params, select)
    except ValueError:
        return []
    return jax.tree.leaves(tree.partition(params, mask)[0])


__all__ = [
    "BOFT",
    "HRA",
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "Format",
    "Full",
    "Houlsby",
    "LoRA",
    "LoRAWeight",
    "Method",
    "Parallel",
    "Pfeiffer",
    "RoAd",
    "Site",
    "Targeted",
    "VeRA",
    "adapt",
    "hooks",
    "method_of",
]
