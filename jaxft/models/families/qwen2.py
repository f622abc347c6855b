"""Qwen2 and 2.5: llama with biases on queries, keys and values, and a sliding window in the upper layers if asked for
(arXiv:2407.10671)."""

from jaxft.core.names import Names
from jaxft.models import layer_fields
from jaxft.models.config import ModelConfig
from jaxft.models.families import llama
from jaxft.models.fields import Fields


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a qwen2 config.json."""
    common = llama.fields_of(fields, kv_heads=32, max_positions=32768)
    fields.expect("attention_bias", True, why="qwen2's queries, keys and values always have biases")
    fields.expect("mlp_bias", False, why="qwen2's mlp has no biases")
    fields.expect("use_mrope", False, why="multimodal rotary positions are not implemented")
    layers = layer_fields.from_max_window(fields)
    return ModelConfig(**common, layers=layers, ropes=llama.rope_of(fields, common))


def names(fields: Fields) -> Names:
    """Torch module names."""
    tied = fields.get("tie_word_embeddings", False)
    return llama.rows(attention_bias=True, output_bias=False, tied=tied)
