"""What rows of the conformance table are built from, besides `jaxft.testing.subject`: adapted embeddings."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft import peft
from jaxft.core.names import Name
from jaxft.core.weight import Weight
from jaxft.testing.subject import IN, LAYERS, LINEAR, OUT, Build, Row, adapted, affine, matrix, normal

__all__ = ["IN", "LAYERS", "LINEAR", "OUT", "Build", "Row", "adapted", "affine", "embedding", "matrix", "normal"]

EMBEDDING = (Name("embed/tokens", "embed", "embedding"), Name("layers/w", "layers.{}.w", "linear"))


def embedding(config: Any, tied: bool) -> Build:
    """A stack of adapted embeddings; ``tied``: the model has no head of its own."""

    def one(key: jax.Array, dtype: jnp.dtype) -> Weight:
        params = {"embed": {"tokens": normal(key, dtype, IN, OUT)}, "layers": {"w": jnp.zeros((2, 4, 4), dtype)}}
        params |= {} if tied else {"head": jnp.zeros((OUT, IN), dtype)}
        return peft.method_of(config).adapt(params, EMBEDDING, key, config)["embed"]["tokens"]

    def build(key: jax.Array, dtype: jnp.dtype) -> Weight:
        layers = [one(k, dtype) for k in jax.random.split(key, LAYERS)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    return build
