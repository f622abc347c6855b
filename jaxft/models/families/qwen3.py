"""Qwen3: qwen2 with a norm on each head's queries and keys and without their biases (arXiv:2505.09388)."""

from jaxft.core.names import Names
from jaxft.models import layer_fields
from jaxft.models.config import ModelConfig
from jaxft.models.families import llama
from jaxft.models.fields import Fields


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a qwen3 config.json; an absent head_dim is 128 whatever the hidden size."""
    common = llama.fields_of(fields, kv_heads=32, head_dim=128, max_positions=32768)
    fields.expect("mlp_bias", False, why="qwen3's mlp has no biases")
    layers = layer_fields.from_max_window(fields)
    return ModelConfig(**common, layers=layers, ropes=llama.rope_of(fields, common), qk_norm="head")


def names(fields: Fields) -> Names:
    """Torch module names."""
    bias, tied = fields.get("attention_bias", False), fields.get("tie_word_embeddings", False)
    return llama.rows(attention_bias=bias, qk_norm=True, tied=tied)
