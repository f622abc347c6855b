"""Granite 3: llama with four multipliers: of embeddings, attention scores, residuals and (a divisor) logits
(IBM 2024, after muP, arXiv:2203.03466)."""

from jaxft.core.names import Names
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.families import llama
from jaxft.models.fields import Fields


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a granite config.json."""
    common = llama.fields_of(fields)
    return ModelConfig(
        **common,
        layers=(Layer(),) * fields.get("num_hidden_layers"),
        ropes=llama.rope_of(fields, common),
        attn_scale=fields.get("attention_multiplier", 1.0),
        input_scale=fields.get("embedding_multiplier", 1.0),
        residual_scale=fields.get("residual_multiplier", 1.0),
        logits_scale=1.0 / fields.get("logits_scaling", 1.0),
    )


def names(fields: Fields) -> Names:
    """Torch module names, llama's."""
    return llama.names(fields)
