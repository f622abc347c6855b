"""Full fine-tuning, and any part of it: a mask over the model's own arrays; no new parameters."""

from dataclasses import dataclass

import jax

from jaxft.core import tree
from jaxft.core.names import Names


@dataclass(frozen=True)
class Full:
    """Trains the model's own arrays. Default learning rate 2e-5."""

    select: str = "full"
    """A regex searched in our paths, or a preset: full, bitfit, norms, embeddings."""


def adapt(params: tree.Params, names: Names, key: jax.Array, config: Full) -> tree.Params:
    """The parameters as they are; raises ValueError if ``select`` matches nothing."""
    del names, key
    tree.trainable_mask(params, config.select)
    return params
