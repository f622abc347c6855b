"""The windows of a convolution's input as the rows of a matrix that is never made: ``windows @ m`` convolves with m.

So a factored map stays factored: LoRA on a convolution is one with A [*window, in, r] and then one of size 1 with B. A
method that does more with its input than to multiply it (rotate, scale or drop features) cannot be used so.
"""

from typing import Any

import jax

from jaxft.core.weight import Weight
from jaxft.flax.kernel import Matrix


class Windows:
    """``x``: the input [batch, *space, in]; ``window``: the sizes [*window, in] that make one row."""

    def __init__(self, x: jax.Array, window: tuple[int, ...], settings: dict[str, Any]):
        self.x, self.window, self.settings = x, window, settings

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def __matmul__(self, w: Any) -> Any:
        if isinstance(w, Weight) and not isinstance(w, Matrix):
            return w.__rmatmul__(self)  # type: ignore[arg-type]
        kernel = (w.base if isinstance(w, Matrix) else w).astype(self.dtype).reshape(*self.window, -1)
        return jax.lax.conv_general_dilated(self.x, kernel, **self.settings)

    def __getattr__(self, name: str) -> Any:
        raise TypeError(f"the windows of a convolution can only be multiplied, and the method asks for their {name!r}")
