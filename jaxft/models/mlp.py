"""The feed-forward block: gated (silu or gelu of one projection times another) or plain."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.models.config import ModelConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def mlp(config: ModelConfig, p: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]. Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202)."""
    act = ACTIVATIONS[config.activation]
    if not config.gated_mlp:
        return act(checkpoint_name(x_BTD @ p["up"], "up")) @ p["down"]
    if config.fused_gate_up:
        gate_BTF, up_BTF = jnp.split(checkpoint_name(x_BTD @ p["gate_up"], "gate"), 2, -1)
    else:
        gate_BTF = checkpoint_name(x_BTD @ p["gate"], "gate")
        up_BTF = checkpoint_name(x_BTD @ p["up"], "up")
    return (act(gate_BTF) * up_BTF) @ p["down"]
