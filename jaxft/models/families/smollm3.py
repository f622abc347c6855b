"""SmolLM3: llama without position encoding in every fourth layer (Hugging Face 2025; NoPE: arXiv:2501.18795)."""

from jaxft.core.names import Names
from jaxft.models import layer_fields
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.families import llama
from jaxft.models.fields import Fields


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a smollm3 config.json; with use_sliding_window the layers without positions slide."""
    common = llama.fields_of(fields, kv_heads=4, max_positions=32768, tied=True)
    depth, interval = fields.get("num_hidden_layers"), fields.get("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(depth)])[:depth]
    if len(rotated) != depth:
        raise ValueError(f"{fields.where}: no_rope_layers has {len(rotated)} entries; expected at least {depth}")
    window = fields.nullable("sliding_window", None)
    slides = fields.get("use_sliding_window", False) and window is not None
    fields.get("max_window_layers", None)  # left over from another family; the model does not use it
    default = [layer_fields.SLIDING if slides and not turn else layer_fields.FULL for turn in rotated]
    windows = layer_fields.windows(fields, layer_fields.types(fields, default), window)
    return ModelConfig(
        **common,
        layers=tuple(Layer(w, rope=0 if turn else None) for w, turn in zip(windows, rotated, strict=True)),
        ropes=llama.rope_of(fields, common, theta=2e6),
    )


def names(fields: Fields) -> Names:
    """Torch module names."""
    return llama.rows(
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        tied=fields.get("tie_word_embeddings", True),
    )
