"""The last layers train whole, the others not at all.

Lee, Tang & Lin 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", section 2
(arXiv:1911.03090): training a quarter of the layers reaches nine tenths of the quality of training all. The layers
below have no trained copy and no gradients, and as layers are then unrolled nothing is computed backwards through them.
"""

from dataclasses import dataclass

import jax
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.peft import places, whole


@dataclass(frozen=True, kw_only=True)
class LastLayers:
    """The last n layers, trained whole. Default learning rate 2e-5."""

    n: int = 2
    """How many layers train."""
    final_norm: bool = True
    """Whether the norm behind the last layer trains too."""
    head: bool = False
    """Whether the head trains too; one that is tied then parts from its embedding, which stays as it is."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"peft.n: got {self.n}; expected at least 1 layer")


def adapt(params: tree.Params, names: Names, key: jax.Array, config: LastLayers) -> tree.Params:
    """Trains every weight of the last layers. Raises ValueError if there are not so many."""
    del key
    num_layers = tree.num_layers(params)
    if config.n > num_layers:
        raise ValueError(f"peft.n: got {config.n}; expected at most {num_layers}, the layers of this model")
    last = np.arange(num_layers) >= num_layers - config.n
    for name in places.rows(names):
        if name.stacked:
            params = whole.wrap(params, name, False, last)
        elif (name.path == places.HEAD and config.head) or (name.path == "final_norm" and config.final_norm):
            params = whole.wrap(params, name, False)
    return params
