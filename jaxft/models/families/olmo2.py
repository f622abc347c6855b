"""OLMo 2: llama with norms after the blocks instead of before, and over whole queries and keys (arXiv:2501.00656)."""

from jaxft.core.names import Names
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.families import llama
from jaxft.models.fields import Fields

NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of an olmo2 config.json."""
    common = llama.fields_of(fields, norm_eps=1e-5)
    return ModelConfig(
        **common,
        layers=(Layer(),) * fields.get("num_hidden_layers"),
        ropes=llama.rope_of(fields, common),
        pre_norm=False,
        post_norm=True,
        qk_norm="whole",
    )


def names(fields: Fields) -> Names:
    """Torch module names."""
    bias, tied = fields.get("attention_bias", False), fields.get("tie_word_embeddings", False)
    return llama.rows(attention_bias=bias, qk_norm=True, norms=NORMS, tied=tied)
