"""Parameter-efficient methods: leaves that add few parameters, or masks over the model's own.

`METHODS` is the literal table. A method is one file: a config that inherits `Targeted` and wraps a base in the Weight
beside it, and the `Format` in which peft stores it; or a mask, or a slot, with an ``adapt`` of its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxft.core import hooks as hooks_
from jaxft.core import tree
from jaxft.core.hooks import Hooks
from jaxft.peft import (
    adalora,
    adalora_hf,
    bitfit,
    boft,
    bottleneck,
    calibration,
    dora,
    fourierft,
    full,
    hra,
    ia3,
    last_layers,
    loha,
    lokr,
    lora,
    lora_fa,
    lora_hf,
    miss,
    multitask_prompt_tuning,
    norms,
    oft,
    p_tuning,
    p_tuning_v2,
    prefix_tuning,
    prompt_tuning,
    randlora,
    road,
    shira,
    sites,
    slots,
    stacked,
    tokens_hf,
    trainable_tokens,
    vera,
    whole,
)
from jaxft.peft.adalora import AdaLoRA
from jaxft.peft.arithmetic import combine, scale
from jaxft.peft.bitfit import BitFit
from jaxft.peft.boft import BOFT
from jaxft.peft.bottleneck import Houlsby, Parallel, Pfeiffer
from jaxft.peft.calibration import Calibration
from jaxft.peft.dora import DoRA
from jaxft.peft.formats import Alone, Format
from jaxft.peft.fourierft import FourierFT
from jaxft.peft.full import Full
from jaxft.peft.hra import HRA
from jaxft.peft.ia3 import IA3
from jaxft.peft.last_layers import LastLayers
from jaxft.peft.loha import LoHa
from jaxft.peft.lokr import LoKr
from jaxft.peft.lora import LoRA, LoRAWeight
from jaxft.peft.lora_data import EVA, CorDA
from jaxft.peft.lora_fa import LoRAFA
from jaxft.peft.lora_init import LoftQ
from jaxft.peft.miss import MiSS
from jaxft.peft.multitask_prompt_tuning import MultitaskPromptTuning
from jaxft.peft.norms import Norms
from jaxft.peft.oft import OFT
from jaxft.peft.p_tuning import PTuning
from jaxft.peft.p_tuning_v2 import PTuningV2
from jaxft.peft.prefix_tuning import PrefixTuning
from jaxft.peft.prompt_tuning import PromptTuning
from jaxft.peft.randlora import RandLora
from jaxft.peft.road import RoAd
from jaxft.peft.shira import SHiRA
from jaxft.peft.sites import Site, Targeted
from jaxft.peft.slot_formats import SlotFormat
from jaxft.peft.slots import Slotted
from jaxft.peft.stacked import Adapter
from jaxft.peft.trainable_tokens import TrainableTokens
from jaxft.peft.vera import VeRA


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`."""

    config: type
    lr: float
    """Default peak learning rate with AdamW."""
    adapt: Callable[..., tree.Params] = sites.adapt
    """(params, names, key, config) -> params; by default ``config.wrap`` at every weight that the config selects."""
    settle: Callable[[Any, Any], Any] = lambda config, model: config
    """(config, model) -> the config with what it leaves to the model (its family, tokenizer, new tokens) filled in."""
    select: Callable[[Any], str | None] = lambda config: None
    """The pattern of plain arrays that train besides the method's own fields."""
    groups: Callable[[Any], dict[str, float]] = lambda config: {}
    """Factors of the learning rate: a regex searched in paths of trained arrays to its factor."""
    hooks: Callable[[Any, tree.Params, int], Hooks] = lambda config, params, steps: hooks_.NONE
    """(config, params, steps of the run) -> what it does in each training step besides the forward pass."""
    calibrate: Callable[[Any], Calibration | None] = lambda config: None
    """What its initialisation asks of the layers' inputs, if it begins from data: see `calibrate`."""
    hf: Format | SlotFormat | Alone | None = None
    """How it is stored in Hugging Face's format; None for a method that has no adapter of its own there."""


METHODS: dict[str, Method] = {
    "full": Method(full.Full, lr=2e-5, adapt=full.adapt, select=lambda config: config.select),
    "lora": Method(lora.LoRA, lr=2e-4, groups=lora.groups, calibrate=lora.calibration, hf=lora_hf.FORMAT),
    "lora_fa": Method(lora_fa.LoRAFA, lr=5e-4, groups=lora.groups, calibrate=lora.calibration, hf=lora_fa.FORMAT),
    "dora": Method(dora.DoRA, lr=2e-4, groups=lora.groups, calibrate=lora.calibration, hf=dora.FORMAT),
    "adalora": Method(adalora.AdaLoRA, lr=1e-3, hooks=adalora.hooks, hf=adalora_hf.FORMAT),
    "houlsby": Method(bottleneck.Houlsby, lr=3e-4),
    "pfeiffer": Method(bottleneck.Pfeiffer, lr=3e-4, adapt=bottleneck.adapt),
    "parallel": Method(bottleneck.Parallel, lr=3e-4, adapt=bottleneck.adapt),
    "vera": Method(vera.VeRA, lr=4e-3, hf=vera.FORMAT),
    "oft": Method(oft.OFT, lr=4e-4, hooks=oft.hooks, hf=oft.FORMAT),
    "boft": Method(boft.BOFT, lr=1e-3, hf=boft.FORMAT),
    "hra": Method(hra.HRA, lr=1e-3, hf=hra.FORMAT),
    "road": Method(road.RoAd, lr=3e-3, hf=road.FORMAT),
    "bitfit": Method(bitfit.BitFit, lr=1e-3, adapt=bitfit.adapt, hf=bitfit.FORMAT),
    "norms": Method(norms.Norms, lr=1e-3, adapt=norms.adapt, hf=norms.FORMAT),
    "last_layers": Method(last_layers.LastLayers, lr=2e-5, adapt=last_layers.adapt),
    "trainable_tokens": Method(
        TrainableTokens,
        lr=1e-3,
        adapt=trainable_tokens.adapt,
        settle=trainable_tokens.settle,
        hf=tokens_hf.FORMAT,
    ),
    "adapter": Method(Adapter, lr=2e-4, adapt=stacked.adapt),
    "ia3": Method(ia3.IA3, lr=5e-3, adapt=ia3.adapt, settle=ia3.settle, hf=ia3.FORMAT),
    "prompt_tuning": Method(prompt_tuning.PromptTuning, lr=3e-2, hf=prompt_tuning.FORMAT),
    "multitask_prompt_tuning": Method(
        multitask_prompt_tuning.MultitaskPromptTuning, lr=3e-2, hf=multitask_prompt_tuning.FORMAT
    ),
    "p_tuning": Method(p_tuning.PTuning, lr=3e-3, hf=p_tuning.FORMAT),
    "prefix_tuning": Method(prefix_tuning.PrefixTuning, lr=3e-2, groups=prefix_tuning.groups, hf=prefix_tuning.FORMAT),
    "p_tuning_v2": Method(p_tuning_v2.PTuningV2, lr=3e-2, groups=prefix_tuning.groups, hf=prefix_tuning.FORMAT),
    "loha": Method(loha.LoHa, lr=1e-3, hf=loha.FORMAT),
    "lokr": Method(lokr.LoKr, lr=1e-3, hf=lokr.FORMAT),
    "randlora": Method(randlora.RandLora, lr=1e-4, hf=randlora.FORMAT),
    "fourierft": Method(fourierft.FourierFT, lr=3e-3, hf=fourierft.FORMAT),
    "shira": Method(shira.SHiRA, lr=5e-4, hf=shira.FORMAT),
    "miss": Method(miss.MiSS, lr=2e-4, hf=miss.FORMAT),
}


def method_of(config: Any) -> Method:
    """The table row of a method's config; one from outside the package needs none. Raises TypeError for no config."""
    for row in METHODS.values():
        if type(config) is row.config:
            return row
    if isinstance(config, Targeted):
        return Method(type(config), lr=config.learning_rate)
    raise TypeError(f"got {config!r}; expected one of {', '.join(m.config.__name__ for m in METHODS.values())}")


def adapt(model: Any, key: jax.Array, method: Any, statistics: Mapping[str, Any] | None = None) -> tree.Params:
    """The model's parameters with one method, or a list of them in order, applied.

    ``model`` has ``params`` and ``names`` (for a slot ``config`` too, and to begin with a text a ``tokenizer``; for
    loftq and qpissa ``originals``); ``method`` is a config such as ``LoRA(rank=16)``. The base's buffers are shared,
    not copied. ``statistics``: what `calibrate` returned, for a method that begins from data."""
    return adapt_for_training(model, key, method if isinstance(method, list | tuple) else [method], statistics)[0]


def calibrate(
    model: Any, batches: Iterable[Any], method: Any, forward: calibration.Forward | None = None
) -> dict[str, Any]:
    """What the data show of the inputs of the weights that ``method`` adapts, by path: ``statistics`` for `adapt`.

    ``batches`` are dicts with ``tokens`` int32[B, T], documents padded on the right, or of any shape with ``segments``;
    ``loss_mask`` bool[B, T], where there is one, says which positions carry loss. ``forward(params, batch)`` is any
    array computed from the model's output; default: ``model.logprobs``. Raises ValueError for a method that begins
    without data, and for targets that cannot be measured."""
    need = method_of(method).calibrate(method)
    if need is None:
        raise ValueError(
            f"calibrate: got {method!r}; expected a method that begins from data, such as LoRA(init='eva')"
        )
    if forward is None:
        forward = lambda params, batch: model.logprobs(params, batch["tokens"], batch.get("segments"))  # noqa: E731
    return need.solve(calibration.measure(model.params, model.names, method, need, batches, forward))


def adapt_for_training(
    model: Any, key: jax.Array, methods: Sequence[Any], statistics: Mapping[str, Any] | None = None
) -> tuple[tree.Params, tree.Params, tree.Params]:
    """(parameters, mask of what trains, default learning rate of each trained array): see `adapt`.

    An array belongs to the first of the methods that trains it; the head of a reward model always trains, with the
    last. Those of a frozen `Adapter` do not train: take the mask from here, as `trainable_mask` cannot know."""
    params, rates, frozen = model.params, dict[int, float](), set[int]()
    for i, config in enumerate(methods):
        row, mine = method_of(config), jax.random.fold_in(key, i)
        config = row.settle(config, model)
        if isinstance(config, Slotted):
            params = slots.put(params, config.slot, config.make(model, params, mine))
        else:
            known = {"statistics": statistics} if row.calibrate(config) else {}
            known |= {"originals": getattr(model, "originals", None)} if row.adapt is sites.adapt else {}
            params = row.adapt(params, model.names, mine, config, **known)
        for leaf in _trained(params, row.select(config)):
            if stacked.is_frozen(config) and id(leaf) not in rates:
                frozen.add(id(leaf))
            rates.setdefault(id(leaf), rate(config))
    patterns = [pattern for c in methods if (pattern := method_of(c).select(c)) is not None]
    patterns = [tree.PRESETS.get(pattern, pattern) for pattern in patterns]
    params = whole.with_score(params, model.names, patterns)
    mask = tree.trainable_mask(params, "|".join(f"(?:{p})" for p in patterns) if patterns else None)
    mask = jax.tree.map(lambda p, m: m and id(p) not in frozen, params, mask)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("peft: nothing to train: every adapter is frozen; add a method, or set frozen: false")
    last = rate(methods[-1])
    return params, mask, jax.tree.map(lambda p, m: rates.get(id(p), last) if m else None, params, mask)


def rate(config: Any) -> float:
    """The default learning rate of a method; of an adapter trained before, that of what trained it."""
    if not isinstance(config, Adapter):
        return method_of(config).lr
    names = stacked.methods_of(config)
    return next((METHODS[name].lr for name in names if name in METHODS), method_of(config).lr)


def first_rate(methods: Sequence[Any]) -> float:
    """The default learning rate of the first method that trains anything, which optim.lr stands for."""
    return rate(next((config for config in methods if not stacked.is_frozen(config)), methods[0]))


def hooks(methods: Sequence[Any], params: tree.Params, steps: int) -> Hooks:
    """What the methods do in each step of a run of ``steps`` steps. Raises ValueError if two differ."""
    made = [(config, method_of(config).hooks(config, params, steps)) for config in methods]
    active = [(config, hook) for config, hook in made if hook is not hooks_.NONE]
    if any(hook is not active[0][1] for _, hook in active):
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
    "EVA",
    "HRA",
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "Adapter",
    "Alone",
    "BitFit",
    "CorDA",
    "DoRA",
    "Format",
    "FourierFT",
    "Full",
    "Houlsby",
    "LastLayers",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAWeight",
    "LoftQ",
    "Method",
    "MiSS",
    "MultitaskPromptTuning",
    "Norms",
    "PTuning",
    "PTuningV2",
    "Parallel",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "RandLora",
    "RoAd",
    "SHiRA",
    "Site",
    "SlotFormat",
    "Slotted",
    "Targeted",
    "TrainableTokens",
    "VeRA",
    "adapt",
    "calibrate",
    "combine",
    "first_rate",
    "hooks",
    "method_of",
    "rate",
    "scale",
]
