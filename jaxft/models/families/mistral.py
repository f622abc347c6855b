"""Mistral: llama with a sliding window in every layer (arXiv:2310.06825)."""

from jaxft.core.names import Names
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.families import llama
from jaxft.models.fields import Fields


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a mistral config.json; a null sliding_window means none, an absent one 4096."""
    common = llama.fields_of(fields, kv_heads=8, max_positions=131072)
    layer = Layer(window=fields.nullable("sliding_window", 4096))
    for name in ("attention_bias", "mlp_bias"):
        fields.expect(name, False, why="mistral's linear layers have no biases")
    layers = (layer,) * fields.get("num_hidden_layers")
    return ModelConfig(**common, layers=layers, ropes=llama.rope_of(fields, common))


def names(fields: Fields) -> Names:
    """Torch module names."""
    return llama.rows(tied=fields.get("tie_word_embeddings", False))
