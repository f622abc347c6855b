"""Which format a model in few bits is written in, and what its config.json says of that to others."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxft.checkpoint.errors import CheckpointError
from jaxft.core.weight import is_packed
from jaxft.quant import FourBit, IntGroups, bitsandbytes, gptqmodel


class Form(NamedTuple):
    """How matrices in few bits are written."""

    tensors: Callable[[Any, str], dict[str, np.ndarray]]
    described: Callable[[Any, str], dict[str, tuple[np.dtype, tuple[int, ...]]]]
    config: Callable[[list[str], list[str], str], dict[str, Any]]
    """``(packed, plain, dtype)``, names of matrices and the others' dtype: the ``quantization_config``."""


def form_of(weights: list[tuple[str, Any]]) -> Form | None:
    """The format that holds all packed ones of these weights; None if none is packed.

    Raises CheckpointError for what no format holds, or none holds together."""
    for name, w in weights:
        if is_packed(w) and not isinstance(w, FourBit | IntGroups):
            expected = "four bits (nf4, fp4) or integers in groups (int4, int8_blockwise, gptq)"
            raise CheckpointError(
                name, repr(w), f"{expected}, as no format holds others", "Write it dense (packed=False)."
            )
    four = [w for _, w in weights if isinstance(w, FourBit)]
    integers = {name: w for name, w in weights if isinstance(w, IntGroups)}
    if four and integers:
        got = f"{four[0].kind} beside {next(iter(integers.values())).dtype}"
        raise CheckpointError("packed", got, "one of them, as a checkpoint has one format", "Write it dense.")
    if integers:
        return _gptq(integers)
    return (
        Form(bitsandbytes.tensors, bitsandbytes.described, functools.partial(_bitsandbytes, four[0])) if four else None
    )


def _bitsandbytes(first: FourBit, packed: list[str], plain: list[str], dtype: str) -> dict[str, Any]:
    del packed
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.kind,
        "bnb_4bit_use_double_quant": first.nested is not None,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted({name.removesuffix(".weight") for name in plain}),
    }


def _gptq(weights: dict[str, IntGroups]) -> Form:
    """The first version of GPTQ's format, which all its readers know, where zero points are half the range; otherwise
    the second, as readers of the first disagree about a zero point of 0."""
    for name, w in weights.items():
        if not gptqmodel.fits(w):
            expected = "whole zero points, and sizes that are multiples of 8 (4 in eight bits)"
            raise CheckpointError(name, repr(w), expected, "Write it dense (packed=False).")
    found = list(weights.values())
    bits = {w.bits for w in found}
    counts = {w.scale.shape[-2] for w in found}
    sizes = {-1} if counts == {1} else {-(-w.shape[-2] // w.scale.shape[-2]) for w in found}
    if len(bits) > 1 or len(sizes) > 1:
        got = f"codes of {sorted(bits)} bits in groups of {sorted(sizes)}"
        raise CheckpointError("packed", got, "one of each, as GPTQ's format has", "Write it dense (packed=False).")
    symmetric = all(w.zero is None for w in found)
    version = gptqmodel.V1 if symmetric else gptqmodel.V2
    told = {
        "quant_method": "gptq",
        "bits": bits.pop(),
        "group_size": sizes.pop(),
        "desc_act": any(w.group is not None for w in found),
        "sym": symmetric,
        "true_sequential": True,
        "checkpoint_format": version,
        "pack_dtype": "int32",
    }
    return Form(
        functools.partial(gptqmodel.tensors, form=version),
        functools.partial(gptqmodel.described, form=version),
        functools.partial(_told, told),
    )


def _told(config: dict[str, Any], packed: list[str], plain: list[str], dtype: str) -> dict[str, Any]:
    """The config, naming what of the layers is left as it is: for GPTQModel and vLLM, and for transformers."""
    del dtype
    inside = {_everywhere(name) for name in plain if _everywhere(name) != _module(name)}
    config = config | {"lm_head": any(_module(name) in ("lm_head", "embed_out") for name in packed)}
    if not inside:
        return config
    blocks = {re.split(r"\.\d+\.", _module(name))[-1] for name in packed}
    return config | {
        "dynamic": {"-:" + pattern: {} for pattern in sorted(inside)},
        "modules_in_block_to_quantize": [[name] for name in sorted(blocks)],
    }


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _everywhere(name: str) -> str:
    """A regex of the module in any layer; the module itself where it is in none."""
    module = _module(name)
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module)) if re.search(r"\.\d+\.", module) else module
