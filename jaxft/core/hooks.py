"""What a fine-tuning method does in a training step besides its forward pass. Pure functions, called inside the jitted
step, which knows no method: a penalty on the parameters is a gradient that is added, a schedule a change of the
parameters after the optimiser's update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxft.core.tree import Params


class Hooks(NamedTuple):
    """By default nothing. A step that is skipped leaves parameters and state as they were."""

    start: Callable[[Params], Any] = lambda trainable: None
    """``start(trainable)``: the state that it needs of its own, a tree of arrays; saved with the run."""
    gradients: Callable[[Params, Params], Params] = lambda trainable, grads: grads
    """``gradients(trainable, grads) -> grads``, before clipping."""
    update: Callable[[jax.Array, Params, Params, Any], tuple[Params, Any]] = lambda step, trainable, grads, state: (
        trainable,
        state,
    )
    """``update(step, trainable, grads, state) -> (trainable, state)``, after the optimiser's update in step number
    ``step`` of the run, counted from 1; ``grads`` are those that the optimiser was given."""


NONE = Hooks()
