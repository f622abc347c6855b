"""GPT-NeoX and Pythia: layer norms, attention and mlp side by side, a quarter of each head rotated, one projection
[q k v] head by head (arXiv:2204.06745)."""

from jaxft.core.names import Name, Names
from jaxft.models import rope_fields
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.fields import ACTIVATIONS, Fields


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a gpt_neox config.json."""
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    positions = fields.get("max_position_embeddings", 2048)
    theta, partial = fields.get("rotary_emb_base", 10000.0), fields.get("rotary_pct", 0.25)
    for name, value in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        fields.expect(name, value, why="outside rope_parameters it can only repeat rotary_emb_base or rotary_pct")
    rope = rope_fields.read(fields, hidden // heads, max_positions=positions, theta=theta, partial=partial)
    return ModelConfig(
        family="gpt_neox",
        vocab_size=fields.get("vocab_size"),
        hidden_size=hidden,
        mlp_size=fields.get("intermediate_size"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        layers=(Layer(),) * fields.get("num_hidden_layers"),
        ropes=(rope,),
        max_positions=positions,
        norm="layer",
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        parallel_residual=fields.get("use_parallel_residual", True),
        qkv="heads",
        activation=fields.choose("hidden_act", ACTIVATIONS, "gelu"),
        gated_mlp=False,
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )


def names(fields: Fields) -> Names:
    """Torch module names."""
    layer, bias = "gpt_neox.layers.{}", fields.get("attention_bias", True)
    # transformers 5 calls the module lm_head, and writes and reads it as embed_out all the same.
    head = () if fields.get("tie_word_embeddings", False) else (Name("head", "embed_out", "linear"),)
    return (
        Name("embed/tokens", "gpt_neox.embed_in", "embedding"),
        Name("layers/attn_norm", f"{layer}.input_layernorm", "norm", bias=True),
        Name("layers/attn/qkv", f"{layer}.attention.query_key_value", "linear", bias),
        Name("layers/attn/o", f"{layer}.attention.dense", "linear", bias),
        Name("layers/mlp_norm", f"{layer}.post_attention_layernorm", "norm", bias=True),
        Name("layers/mlp/up", f"{layer}.mlp.dense_h_to_4h", "linear", bias=True),
        Name("layers/mlp/down", f"{layer}.mlp.dense_4h_to_h", "linear", bias=True),
        Name("final_norm", "gpt_neox.final_layer_norm", "norm", bias=True),
        *head,
    )
