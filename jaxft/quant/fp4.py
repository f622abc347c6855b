"""FP4: a sign, two bits of exponent and one of mantissa, divided by 12, as bitsandbytes has it.

W = code[i] * absmax(block),   code = +-{0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1}
"""

from typing import Any

from jaxft.quant import four_bit
from jaxft.quant.four_bit import FourBit


def quantize(w: Any, block_size: int = 64, double_quant: bool = True) -> FourBit:
    """FP4 of ``w``, floating [*stack, in, out]; ``dense()`` is in its dtype. Raises as `four_bit.quantize`."""
    return four_bit.quantize(w, "fp4", block_size, double_quant)
