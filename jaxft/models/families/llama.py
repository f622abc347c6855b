"""Llama 1 to 3.x: rms norms, rotary positions, grouped heads, gated silu (arXiv:2302.13971, arXiv:2407.21783).

The module names and most fields are shared by its many descendants, which import `names` and `fields_of` from here.
"""

from typing import Any

from jaxft.core.names import Name, Names
from jaxft.models import rope_fields
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.fields import ACTIVATIONS, Fields


def fields_of(fields: Fields) -> dict[str, Any]:
    """The fields that every llama-like config has, as keyword arguments of ModelConfig (all but layers, ropes)."""
    heads = fields.get("num_attention_heads")
    hidden = fields.get("hidden_size")
    return {
        "family": fields.raw["model_type"],
        "vocab_size": fields.get("vocab_size"),
        "hidden_size": hidden,
        "mlp_size": fields.get("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": fields.get("head_dim", hidden // heads),
        "max_positions": fields.get("max_position_embeddings", 2048),
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "activation": fields.choose("hidden_act", ACTIVATIONS, "silu"),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a llama config.json."""
    common = fields_of(fields)
    layers = (Layer(),) * fields.get("num_hidden_layers")
    return ModelConfig(**common, layers=layers, ropes=(rope_fields.read(fields, common["head_dim"]),))


def names(fields: Fields) -> Names:
    """Torch module names."""
    return rows(
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        tied=fields.get("tie_word_embeddings", False),
    )


def rows(*, attention_bias: bool = False, output_bias: bool | None = None, mlp_bias: bool = False, tied: bool) -> Names:
    """Llama's module names; ``output_bias`` defaults to ``attention_bias``."""
    layer = "model.layers.{}"
    output_bias = attention_bias if output_bias is None else output_bias
    head = () if tied else (Name("head", "lm_head", "linear"),)
    return (
        Name("embed/tokens", "model.embed_tokens", "embedding"),
        Name("layers/attn_norm", f"{layer}.input_layernorm", "norm"),
        *(Name(f"layers/attn/{p}", f"{layer}.self_attn.{p}_proj", "linear", attention_bias) for p in "qkv"),
        Name("layers/attn/o", f"{layer}.self_attn.o_proj", "linear", output_bias),
        Name("layers/mlp_norm", f"{layer}.post_attention_layernorm", "norm"),
        *(Name(f"layers/mlp/{p}", f"{layer}.mlp.{p}_proj", "linear", mlp_bias) for p in ("gate", "up", "down")),
        Name("final_norm", "model.norm", "norm"),
        *head,
    )
