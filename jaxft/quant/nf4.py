"""NF4: sixteen values spaced as the quantiles of a normal distribution.

QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, sections 3 and appendix E:

    W = code[i] * absmax(block),   code: midpoints of equal shares of a normal distribution, from -1 to 1, 0 among them
"""

from typing import Any

from jaxft.quant import four_bit
from jaxft.quant.four_bit import FourBit


def quantize(w: Any, block_size: int = 64, double_quant: bool = True) -> FourBit:
    """NF4 of ``w``, floating [*stack, in, out]; ``dense()`` is in its dtype. Raises as `four_bit.quantize`."""
    return four_bit.quantize(w, "nf4", block_size, double_quant)
