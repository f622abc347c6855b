"""GPT-2: layer norms, learned positions, one fused projection [q | k | v], stored [in, out] (Radford et al. 2019)."""

from jaxft.core.names import Name, Names
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.fields import ACTIVATIONS, Fields

# The heads of other tasks, and the precision in which scores are computed: no part of the language model's maths.
IGNORED = (
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
    "reorder_and_upcast_attn predict_special_tokens output_past"
)


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a gpt2 config.json."""
    hidden, heads, positions = fields.get("n_embd"), fields.get("n_head"), fields.get("n_positions", 1024)
    fields.expect("n_ctx", positions, why="it is n_positions under an older name")
    fields.expect("n_special", 0, why="extra embeddings are not implemented")
    for name in IGNORED.split():
        fields.get(name, None)
    by_depth = fields.get("scale_attn_by_inverse_layer_idx", False)
    scales = (1.0 / (i + 1) if by_depth else 1.0 for i in range(fields.get("n_layer")))
    return ModelConfig(
        family="gpt2",
        vocab_size=fields.get("vocab_size"),
        hidden_size=hidden,
        mlp_size=fields.get("n_inner", 4 * hidden),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        layers=tuple(Layer(rope=None, score_scale=scale) for scale in scales),
        max_positions=positions,
        learned_positions=True,
        norm="layer",
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        qkv="blocks",
        activation=fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        attn_scale=None if fields.get("scale_attn_weights", True) else 1.0,
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )


def names(fields: Fields) -> Names:
    """Torch module names."""
    layer = "transformer.h.{}"
    head = () if fields.get("tie_word_embeddings", True) else (Name("head", "lm_head", "linear"),)
    return (
        Name("embed/tokens", "transformer.wte", "embedding"),
        Name("embed/positions", "transformer.wpe", "embedding"),
        Name("layers/attn_norm", f"{layer}.ln_1", "norm", bias=True),
        Name("layers/attn/qkv", f"{layer}.attn.c_attn", "conv1d", bias=True),
        Name("layers/attn/o", f"{layer}.attn.c_proj", "conv1d", bias=True),
        Name("layers/mlp_norm", f"{layer}.ln_2", "norm", bias=True),
        Name("layers/mlp/up", f"{layer}.mlp.c_fc", "conv1d", bias=True),
        Name("layers/mlp/down", f"{layer}.mlp.c_proj", "conv1d", bias=True),
        Name("final_norm", "transformer.ln_f", "norm", bias=True),
        *head,
    )
