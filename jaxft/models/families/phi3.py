"""Phi-3, 3.5 and 4-mini: llama with fused projections, longrope and, in some, partly rotated heads and a sliding window
(arXiv:2404.14219)."""

from jaxft.core.names import Names
from jaxft.models import rope_fields
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.families import llama
from jaxft.models.fields import Fields


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a phi3 config.json."""
    common = llama.fields_of(fields, max_positions=4096, norm_eps=1e-5)
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.expect(name, False, why="phi3's linear layers have no biases")
    for name in ("full_attn_mod", "interpolate_factor"):
        fields.expect(name, 1, why="transformers does not implement it")
    positions = common["max_positions"]
    rope = rope_fields.read(fields, common["head_dim"], max_positions=positions, partial=1.0, original_max=4096)
    layer = Layer(window=fields.nullable("sliding_window", None))
    return ModelConfig(
        **common,
        layers=(layer,) * fields.get("num_hidden_layers"),
        ropes=(rope,),
        qkv="blocks",
        fused_gate_up=True,
    )


def names(fields: Fields) -> Names:
    """Torch module names."""
    return llama.rows(fused=True, tied=fields.get("tie_word_embeddings", False))
