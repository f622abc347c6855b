"""Gemma 2: norms on both sides of each block, every other layer local, soft-capped scores and logits
(arXiv:2408.00118)."""

from typing import Any

from jaxft.core.names import Names
from jaxft.models import layer_fields
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.families import llama
from jaxft.models.fields import ACTIVATIONS, Fields

NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def fields_of(fields: Fields, max_positions: int) -> dict[str, Any]:
    """The fields that gemma 2 and 3 share, as keyword arguments of ModelConfig."""
    common = llama.fields_of(fields, kv_heads=4, head_dim=256, max_positions=max_positions, tied=True)
    fields.expect("use_bidirectional_attention", False, why="attention is causal here")
    return common | {
        # hidden_act, where a config has it too, is not what the model uses.
        "activation": fields.choose("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "norm_offset": 1.0,
        "post_norm": True,
        "attn_scale": fields.get("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": common["hidden_size"] ** 0.5,
    }


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a gemma2 config.json."""
    common = fields_of(fields, max_positions=8192)
    window = fields.nullable("sliding_window", 4096)
    fields.expect("sliding_window_size", window, why="it repeats sliding_window")
    depth = fields.get("num_hidden_layers")
    default = [layer_fields.FULL if i % 2 else layer_fields.SLIDING for i in range(depth)]
    windows = layer_fields.windows(fields, layer_fields.types(fields, default), window)
    return ModelConfig(
        **common,
        layers=tuple(Layer(window=w) for w in windows),
        ropes=llama.rope_of(fields, common),
        attn_softcap=fields.nullable("attn_logit_softcapping", 50.0),
        final_softcap=fields.nullable("final_logit_softcapping", 30.0),
    )


def names(fields: Fields) -> Names:
    """Torch module names."""
    bias, tied = fields.get("attention_bias", False), fields.get("tie_word_embeddings", True)
    return llama.rows(attention_bias=bias, norms=NORMS, tied=tied)
