"""Llama 1 to 3.x: rms norms, rotary positions, grouped heads, gated silu (arXiv:2302.13971, arXiv:2407.21783).

The module names and most fields are shared by its many descendants, which take `fields_of`, `rope_of` and `rows` from
here.
"""

from typing import Any

from jaxft.core.names import Name, Names
from jaxft.models import rope_fields
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.fields import ACTIVATIONS, Fields
from jaxft.models.rope import Rope


def fields_of(
    fields: Fields,
    *,
    max_positions: int = 2048,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    tied: bool = False,
) -> dict[str, Any]:
    """The fields that every llama-like config has, as keyword arguments of ModelConfig (all but layers, ropes).

    The keywords are what the family's config class takes an absent field for; None: derived from the others."""
    heads = fields.get("num_attention_heads")
    hidden = fields.get("hidden_size")
    return {
        "family": fields.raw["model_type"],
        "vocab_size": fields.get("vocab_size"),
        "hidden_size": hidden,
        "mlp_size": fields.get("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": fields.nullable("num_key_value_heads", kv_heads) or heads,
        "head_dim": fields.nullable("head_dim", head_dim) or hidden // heads,
        "max_positions": fields.get("max_position_embeddings", max_positions),
        "norm_eps": fields.get("rms_norm_eps", norm_eps),
        "activation": fields.choose("hidden_act", ACTIVATIONS, "silu"),
        "tie_embeddings": fields.get("tie_word_embeddings", tied),
    }


def rope_of(fields: Fields, common: dict[str, Any], theta: float = 10000.0) -> tuple[Rope]:
    """The one rotary table of a model whose layers share it; ``theta`` is the family's default."""
    return (rope_fields.read(fields, common["head_dim"], max_positions=common["max_positions"], theta=theta),)


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a llama config.json."""
    common = fields_of(fields)
    fields.expect("rope_interleaved", False, why="heads are rotated as two halves")
    return ModelConfig(**common, layers=(Layer(),) * fields.get("num_hidden_layers"), ropes=rope_of(fields, common))


def names(fields: Fields) -> Names:
    """Torch module names."""
    return rows(
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        tied=fields.get("tie_word_embeddings", False),
    )


PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def rows(
    *,
    attention_bias: bool = False,
    output_bias: bool | None = None,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    fused: bool = False,
    norms: dict[str, str] = PRE_NORMS,
    tied: bool,
) -> Names:
    """Llama's module names. ``output_bias`` defaults to ``attention_bias``; ``norms``: ours to theirs, in a layer."""
    layer = "model.layers.{}"
    output_bias = attention_bias if output_bias is None else output_bias
    attn, mlp = (("qkv",), ("gate_up", "down")) if fused else (("q", "k", "v"), ("gate", "up", "down"))
    head = () if tied else (Name("head", "lm_head", "linear"),)
    qk_norms = ("q_norm", "k_norm") if qk_norm else ()
    return (
        Name("embed/tokens", "model.embed_tokens", "embedding"),
        *(Name(f"layers/{ours}", f"{layer}.{theirs}", "norm") for ours, theirs in norms.items()),
        *(Name(f"layers/attn/{p}", f"{layer}.self_attn.{p}_proj", "linear", attention_bias) for p in attn),
        Name("layers/attn/o", f"{layer}.self_attn.o_proj", "linear", output_bias),
        *(Name(f"layers/attn/{p}", f"{layer}.self_attn.{p}", "norm") for p in qk_norms),
        *(Name(f"layers/mlp/{p}", f"{layer}.mlp.{p}_proj", "linear", mlp_bias) for p in mlp),
        Name("final_norm", "model.norm", "norm"),
        *head,
    )
