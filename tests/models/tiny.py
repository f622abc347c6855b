"""Tiny random `transformers` models, one row each: what loading, saving, logits and generation are tested on.

Every parameter is random (norm scales and biases too, which `transformers` initialises to ones and zeros), so that a
weight read from the wrong place shows. A new family adds its rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

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
    return transformers.LlamaConfig(**{**SIZES, "head_dim": 8, **changes})


def mistral(**changes: Any) -> PretrainedConfig:
    return transformers.MistralConfig(**{**SIZES, "sliding_window": 6, **changes})


def qwen2(**changes: Any) -> PretrainedConfig:
    return transformers.Qwen2Config(**{**SIZES, **changes})


def qwen3(**changes: Any) -> PretrainedConfig:
    return transformers.Qwen3Config(**{**SIZES, "head_dim": 16, **changes})


def gpt2(**changes: Any) -> PretrainedConfig:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    ids = {name: SIZES[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return transformers.GPT2Config(**{**sizes, **ids, **changes})


def gpt_neox(**changes: Any) -> PretrainedConfig:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    return transformers.GPTNeoXConfig(**{**sizes, "hidden_size": 64, **changes})


def gemma2(**changes: Any) -> PretrainedConfig:
    """Caps low enough to bend the scores and logits of a tiny model."""
    own = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6, "num_hidden_layers": 4}
    caps = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "tie_word_embeddings": True}
    return transformers.Gemma2Config(**{**SIZES, **own, **caps, **changes})


def gemma3_text(**changes: Any) -> PretrainedConfig:
    """Two local layers to a global one, and one local layer over: no period divides the depth."""
    own = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6, "num_hidden_layers": 4}
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    ropes = {"full_attention": rope("linear", 5000.0, factor=4.0), "sliding_attention": rope("default", 100.0)}
    more = {"layer_types": kinds, "rope_parameters": ropes, "tie_word_embeddings": True}
    return transformers.Gemma3TextConfig(**{**SIZES, **own, **more, **changes})


def phi3(**changes: Any) -> PretrainedConfig:
    return transformers.Phi3Config(**{**SIZES, "original_max_position_embeddings": 64, **changes})


def olmo2(**changes: Any) -> PretrainedConfig:
    return transformers.Olmo2Config(**{**SIZES, **changes})


def granite(**changes: Any) -> PretrainedConfig:
    scales = {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
    }
    return transformers.GraniteConfig(**{**SIZES, **scales, **changes})


def smollm3(**changes: Any) -> PretrainedConfig:
    """Every other layer without positions."""
    own = {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "tie_word_embeddings": True}
    return transformers.SmolLM3Config(**{**SIZES, **own, **changes})


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
    "mistral": mistral,  # every layer slides
    "mistral_full": lambda: mistral(sliding_window=None, head_dim=16, num_key_value_heads=4, tie_word_embeddings=True),
    "mistral_mqa": lambda: mistral(num_key_value_heads=1),
    "qwen2": qwen2,
    "qwen2_window": lambda: qwen2(use_sliding_window=True, sliding_window=6, max_window_layers=1, num_hidden_layers=4),
    "qwen2_tied_mqa": lambda: qwen2(tie_word_embeddings=True, num_key_value_heads=1),
    "qwen3": qwen3,
    "qwen3_window": lambda: qwen3(
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        attention_bias=True,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "gpt2": gpt2,
    "gpt2_untied": lambda: gpt2(tie_word_embeddings=False, n_inner=40, activation_function="gelu"),
    "gpt2_by_depth": lambda: gpt2(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gpt2_unscaled": lambda: gpt2(scale_attn_weights=False, activation_function="relu"),
    "gpt_neox": gpt_neox,  # attention and mlp side by side, a quarter of each head rotated
    "gpt_neox_serial": lambda: gpt_neox(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_fast"),
    "gpt_neox_tied": lambda: gpt_neox(
        tie_word_embeddings=True, rope_parameters=rope("linear", factor=2.0, partial_rotary_factor=1.0)
    ),
    "gemma2": gemma2,
    "gemma2_mha_bias": lambda: gemma2(num_key_value_heads=4, attention_bias=True, tie_word_embeddings=False),
    "gemma2_uncapped": lambda: gemma2(
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gemma3_text": gemma3_text,
    "gemma3_text_capped": lambda: gemma3_text(
        final_logit_softcapping=2.0, attn_logit_softcapping=1.0, num_key_value_heads=1, tie_word_embeddings=False
    ),
    "phi3": phi3,
    "phi3_mha_window": lambda: phi3(num_key_value_heads=4, sliding_window=6, tie_word_embeddings=True),
    "phi3_longrope": lambda: phi3(
        original_max_position_embeddings=16,
        rope_parameters=rope("longrope", short_factor=[1.0, 1.3], long_factor=[1.5, 4.0], partial_rotary_factor=0.5),
    ),
    "olmo2": olmo2,
    "olmo2_mha_bias": lambda: olmo2(num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True),
    "granite": granite,
    "granite_tied_bias": lambda: granite(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, num_key_value_heads=1
    ),
    "smollm3": smollm3,
    "smollm3_window": lambda: smollm3(
        use_sliding_window=True, sliding_window=6, num_key_value_heads=1, tie_word_embeddings=False, mlp_bias=True
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
