"""Tiny random `transformers` models, one row each: what loading, saving, logits and generation are tested on.

Every parameter is random (norm scales and biases too, which `transformers` initialises to ones and zeros), so that a
weight read from the wrong place shows. A new family adds its rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, PretrainedConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**changes: Any) -> PretrainedConfig:
    return LlamaConfig(**{**SIZES, "head_dim": 8, **changes})


def rope(rope_type: str, theta: float = 1000.0, **settings: Any) -> dict[str, Any]:
    """The `rope_parameters` of a config."""
    return {"rope_type": rope_type, "rope_theta": theta, **settings}


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": llama,  # grouped heads
    "llama_mha": lambda: llama(num_key_value_heads=4),
    "llama_mqa": lambda: llama(num_key_value_heads=1),
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "llama_bias": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama_wide_heads": lambda: llama(head_dim=16),
    "llama_rope_linear": lambda: llama(rope_parameters=rope("linear", factor=2.0)),
    "llama_rope_dynamic": lambda: llama(rope_parameters=rope("dynamic", factor=2.0), max_position_embeddings=16),
    "llama_rope_yarn": lambda: llama(
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0)
    ),
    "llama_rope_longrope": lambda: llama(
        rope_parameters=rope(
            "longrope",
            short_factor=[1.0, 1.1, 1.3, 1.5],
            long_factor=[1.0, 2.0, 3.0, 4.0],
            factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    "llama_rope_llama3": lambda: llama(
        rope_parameters=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        )
    ),
}


def model(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The random model of a row, in evaluation mode."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 0.25 if parameter.ndim == 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    return made.to(dtype).eval()


def save(name: str, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    """Saves a row's model as sharded safetensors and returns the directory."""
    model(name, dtype).save_pretrained(directory, max_shard_size=shard)
    return Path(directory)


def logits(made: transformers.PreTrainedModel, tokens: Any, **inputs: Any) -> Any:
    """float32[B, T, V] as numpy, for token ids [B, T]."""
    with torch.no_grad():
        return made(torch.as_tensor(tokens).long(), **inputs).logits.float().numpy()
