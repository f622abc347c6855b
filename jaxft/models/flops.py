"""Model FLOPs: what a pass must compute, recomputation not counted, for utilisation and for plans."""

from jaxft.core.names import Names
from jaxft.models import init
from jaxft.models.config import ModelConfig


def matmul_parameters(config: ModelConfig, names: Names) -> int:
    """Parameters that take part in a product for every token: all matrices, the head, not the embedding look-up."""
    total = 0
    for path, shape in init.shapes(config, names).items():
        if not (path.startswith("embed") or path.endswith("norm")):
            stack = shape[0] if path.startswith("layers") else 1
            total += stack * shape[-2] * shape[-1]
    return total + (config.vocab_size * config.hidden_size if config.tie_embeddings else 0)


def per_token(config: ModelConfig, names: Names, length: int, base_trained: bool) -> float:
    """FLOPs of forward and backward pass for one token of a row of ``length`` tokens.

    Two per parameter and product: forward, gradient of the input, and gradient of the weight if the base is trained
    (6 N), not if it is frozen (4 N); causal attention adds 6 x length x heads x head size a layer, less in a window.
    An adapter's own products (about 1 %) are left out."""
    products = (6 if base_trained else 4) * matmul_parameters(config, names)
    seen = sum(min(length, layer.window or length) for layer in config.layers)
    return products + 6 * seen * config.num_heads * config.head_dim
