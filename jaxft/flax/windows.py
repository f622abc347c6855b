"""The windows of a convolution's input as the rows of a matrix that is never made: ``windows @ m`` convolves with m.

So a factored map stays factored: LoRA on a convolution is one with A [*window, in, r] and then one of size 1 with B. It
drops features of the input, before windows are taken of it. A method that does more with the rows than to multiply them
(rotates, reshapes or adds up features) cannot be used so.
"""

import dataclasses
from typing import Any

import jax

from jaxft.core.weight import Weight
from jaxft.flax.held import STATIC
from jaxft.flax.kernel import Matrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """``x``: the input [batch, *space, in]; ``window``: the sizes [*window, in] that make one row."""

    x: Any
    window: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    settings: tuple[tuple[str, Any], ...] = dataclasses.field(metadata=STATIC)
    """Of the convolution, by name."""
    user: str = dataclasses.field(default="", metadata=STATIC)
    """What is being multiplied by."""

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def __matmul__(self, w: Any) -> Any:
        if isinstance(w, Weight) and not isinstance(w, Matrix):
            return w.__rmatmul__(dataclasses.replace(self, user=type(w).__name__))  # type: ignore[arg-type]
        kernel = (w.base if isinstance(w, Matrix) else w).astype(self.dtype).reshape(*self.window, -1)
        return jax.lax.conv_general_dilated(self.x, kernel, **dict(self.settings))

    def __getattr__(self, name: str) -> Any:
        raise TypeError(
            f"{self.user} asks for {name!r} of the windows of a convolution, which can only be multiplied. Leave it "
            "out of targets, or choose a method that does no more with its input, such as lora, dora or loha."
        )
