"""Which weights of a model are stored in few bits, and how."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Weight
from jaxft.quant import eight_bit, four_bit, groups
from jaxft.quant.gptq import GPTQ

Method = Literal["none", "nf4", "fp4", "int4", "int8_blockwise", "gptq", "int8", "fp8"]
GROUPED = {"int4": 4, "int8_blockwise": 8}
"""Bits of what is rounded to the nearest integer of each block's grid."""


@dataclass(frozen=True)
class QuantConfig:
    """How the linear layers of the decoder are stored. Embeddings, norms, biases and the head stay as they are."""

    method: Method = "none"
    """nf4 or fp4: four bits and a scale for each block. int4 or int8_blockwise: integers with a scale for each block,
    rounded to the nearest. gptq: the same integers chosen with calibration data, by jaxft quantize. int8 or fp8: eight
    bits and a scale for each output, multiplied in eight bits. none: nothing is quantised."""
    block_size: int = 64
    """Input features that share a scale: in nf4 and fp4 a power of two from 32 to 4096, in int4, int8_blockwise and
    gptq any divisor of their number, -1 for all of them; int8 and fp8 have no blocks."""
    symmetric: bool = True
    """Whether ranges have their middle at zero in int4, int8_blockwise and gptq; otherwise blocks have zero points."""
    gptq: GPTQ = field(default_factory=GPTQ)
    """Settings of gptq."""
    double_quant: bool = True
    """Whether the scales of nf4 and fp4 are quantised as well (0.13 instead of 0.5 bits a parameter)."""
    compute: Literal["exact", "int8", "fp8"] = "exact"
    """What nf4 and fp4 are multiplied in. exact: the dtype of the activations. int8 or fp8: eight bits, about a third
    faster where a GPU or TPU has them, at a relative error of .01 or .04 of each product."""
    equalise: bool | None = None
    """In int8 and fp8: whether the weights of an input feature that are far smaller than the others' are made as large
    before they are rounded, and the activations smaller: these are the outliers that many models have. Default: int8
    only, as the steps of fp8 are relative."""
    skip: str = ""
    """A regex searched in torch module names and in our paths: what it finds stays as it is, such as down_proj."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"quant.method: got {self.method!r}; expected one of {', '.join(get_args(Method))}")
        if self.compute not in ("exact", *eight_bit.CODES):
            raise ValueError(f"quant.compute: got {self.compute!r}; expected one of exact, int8, fp8")
        if self.compute != "exact" and self.method not in (*four_bit.KINDS, "none"):
            raise ValueError(
                f"quant.compute: got {self.compute} with quant.method={self.method}; expected nf4 or fp4: "
                "int8 and fp8 are multiplied in eight bits as they are. Leave it out."
            )
        try:
            re.compile(self.skip)
        except re.error as error:
            raise ValueError(f"quant.skip: got {self.skip!r}, no regex ({error})") from None

    @property
    def _equalise(self) -> bool:
        return self.method == "int8" if self.equalise is None else self.equalise

    def picks(self, name: Name) -> bool:
        """Whether the weight of that name is stored in few bits."""
        skipped = self.skip and (re.search(self.skip, name.module) or re.search(self.skip, name.path))
        return name.stacked and name.kind in ("linear", "conv1d") and not skipped

    def picked(self, names: Names) -> list[Name]:
        """The names of what is stored in few bits. Raises ValueError if the config skips everything."""
        found = [name for name in names if self.picks(name)]
        if not found:
            raise ValueError(f"quant.skip: {self.skip!r} leaves nothing to quantise")
        return found

    def packer(self, name: Name) -> Callable[[Any], Weight] | None:
        """What packs the weight of that name; None for one that stays as it is."""
        return self.pack if self.picks(name) else None

    def pack(self, w: Any) -> Weight:
        """The few bits of a floating array [*stack, in, out]. Raises ValueError if it does not fit."""
        if self.method in eight_bit.CODES:
            return eight_bit.quantize(w, self.method, equalise=self._equalise)
        if self.method in GROUPED:
            return groups.quantize(w, GROUPED[self.method], self.block_size, self.symmetric)
        return four_bit.quantize(w, self.method, self.block_size, self.double_quant, self.compute)


def chosen(quantize: "str | QuantConfig | None") -> QuantConfig | None:
    """The config that a user's word, or config, stands for; None if nothing is to be quantised.

    Raises ValueError for gptq: that takes more than the weight."""
    config = QuantConfig(method=quantize) if isinstance(quantize, str) else quantize  # type: ignore[arg-type]
    if config is not None and config.method == "gptq":
        raise ValueError(
            "quant.method: got gptq, which needs calibration data; quantise once and load the result: jaxft quantize "
            "MODEL quant.method=gptq data.path=rows.jsonl --out DIR (in Python, jaxft.calibrate.gptq)"
        )
    return None if config is None or config.method == "none" else config


def pack(params: tree.Params, names: Names, config: QuantConfig) -> tree.Params:
    """The model with its chosen weights in few bits. Raises ValueError naming the weight that does not fit, or if the
    config skips everything."""

    def one(name: Name, w: Any) -> Any:
        if isinstance(w, Weight):
            raise ValueError(
                f"{name.path}: got a {type(w).__name__}; expected a plain weight: quantise before adapting"
            )
        try:
            return config.pack(w)
        except ValueError as error:
            raise ValueError(f"{name.path}: {error}") from None

    for name in config.picked(names):
        params = tree.wrap(params, name.path, functools.partial(one, name))
    return params
