"""Parameter-efficient methods: leaves that add few parameters, or masks over the model's own.

`METHODS` is the literal table. A method is one file: a config dataclass, a Weight subclass or a mask, and
``adapt(params, names, key, config) -> params``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxft.core import tree
from jaxft.peft import full, lora, lora_hf
from jaxft.peft.full import Full
from jaxft.peft.lora import LoRA, LoRAWeight


@dataclass(frozen=True)
class Format:
    """A method's own part of Hugging Face's adapter format; `hf` has what all methods share."""

    peft_type: str
    """Its name in adapter_config.json."""
    leaf: type
    """The Weight that holds it."""
    fields: tuple[str, ...]
    """Config fields that are read, or that change nothing a trained adapter computes; any other set one is refused."""
    export: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
    """(leaves by path, params, names, num_layers) -> (config fields, tensors)."""
    refuse: Callable[..., None]
    """(where, config): raises AdapterError for a value of a known field that is not understood."""
    restore: Callable[..., tree.Params]
    """(where, config, tensors, params, names) -> params; takes out of ``tensors`` what it uses."""


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`."""

    config: type
    adapt: Callable[..., tree.Params]
    lr: float
    """Default peak learning rate with AdamW."""
    select: Callable[[Any], str | None] = lambda config: None
    """The pattern of plain arrays that train besides the method's own fields."""
    hf: Format | None = None
    """How it is stored in Hugging Face's format; None for a method that has no adapter of its own."""


LORA = Format("LORA", LoRAWeight, lora_hf.FIELDS, lora_hf.export, lora_hf.refuse_unknown, lora_hf.restore)


METHODS: dict[str, Method] = {
    "full": Method(Full, full.adapt, lr=2e-5, select=lambda config: config.select),
    "lora": Method(LoRA, lora.adapt, lr=2e-4, hf=LORA),
}


def method_of(config: Any) -> Method:
    """The table row of a method's config. Raises TypeError for anything else."""
    for row in METHODS.values():
        if type(config) is row.config:
            return row
    raise TypeError(f"got {config!r}; expected one of {', '.join(m.config.__name__ for m in METHODS.values())}")


def adapt(model: Any, key: jax.Array, method: Any) -> tree.Params:
    """The model's parameters with one method, or a list of them in order, applied.

    ``model`` has ``params`` and ``names``; ``method`` is a config such as ``LoRA(rank=16)``. The base's buffers are
    shared, not copied."""
    methods: Sequence[Any] = method if isinstance(method, list | tuple) else [method]
    params = model.params
    for i, config in enumerate(methods):
        params = method_of(config).adapt(params, model.names, jax.random.fold_in(key, i), config)
    return params


__all__ = ["METHODS", "Format", "Full", "LoRA", "Method", "adapt", "method_of"]
