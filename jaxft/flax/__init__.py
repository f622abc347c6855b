"""The bridge to Flax: every method that wraps weights on any linen or NNX model; a jaxft model as a module of either."""

from jaxft.flax import linen, nnx

__all__ = ["linen", "nnx"]
