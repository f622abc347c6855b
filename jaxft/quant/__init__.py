"""Weights that store fewer bits than they stand for, usable wherever an array is: ``x @ w``, slices, shardings."""

from jaxft.quant import bitsandbytes, fp4, groups, nf4
from jaxft.quant.config import QuantConfig, chosen, pack
from jaxft.quant.eight_bit import EightBit
from jaxft.quant.four_bit import FourBit
from jaxft.quant.groups import IntGroups

__all__ = ["EightBit", "FourBit", "IntGroups", "QuantConfig", "bitsandbytes", "chosen", "fp4", "groups", "nf4", "pack"]
