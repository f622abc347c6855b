"""The bridge to Flax: every method that wraps weights on any linen or NNX model, and jaxft models as modules."""

from jaxft.flax import linen, nnx

__all__ = ["linen", "nnx"]
