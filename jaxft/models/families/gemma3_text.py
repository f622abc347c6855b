"""Gemma 3, text only: gemma 2 with a norm on each head's queries and keys, five local layers to a global one, each
kind with a rotary table of its own (arXiv:2503.19786)."""

from jaxft.core.names import Names
from jaxft.models import layer_fields, rope_fields
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.families import gemma2, llama
from jaxft.models.fields import Fields
from jaxft.models.rope import Rope

GLOBAL, LOCAL = 0, 1
THETA = {layer_fields.FULL: ("rope_theta", 1e6), layer_fields.SLIDING: ("rope_local_base_freq", 1e4)}


def config(fields: Fields) -> ModelConfig:
    """ModelConfig of a gemma3_text config.json."""
    common = gemma2.fields_of(fields, max_positions=131072)
    pattern, depth = fields.get("sliding_window_pattern", 6), fields.get("num_hidden_layers")
    fields.get("_sliding_window_pattern", None)  # what layer_types, saved with it, was made from
    fields.get("attn_logit_softcapping", None)  # gemma 3 does not cap its scores, whatever this says
    default = [layer_fields.SLIDING if (i + 1) % pattern else layer_fields.FULL for i in range(depth)]
    kinds = layer_fields.types(fields, default)
    windows = layer_fields.windows(fields, kinds, fields.nullable("sliding_window", 4096))
    tables = [GLOBAL if kind == layer_fields.FULL else LOCAL for kind in kinds]
    return ModelConfig(
        **common,
        layers=tuple(Layer(window=w, rope=table) for w, table in zip(windows, tables, strict=True)),
        ropes=_ropes(fields, common["head_dim"], common["max_positions"]),
        qk_norm="head",
        final_softcap=fields.nullable("final_logit_softcapping", None),
    )


def _ropes(fields: Fields, head_dim: int, max_positions: int) -> tuple[Rope, ...]:
    """The global and the local table; the older rope_scaling is the global one's."""
    nested = fields.get("rope_parameters", {})
    fields.expect("partial_rotary_factor", 1, why="gemma 3 rotates whole heads")
    extra = sorted(set(nested) - set(THETA))
    if extra:
        raise ValueError(f"{fields.where}: rope_parameters has {extra}; expected only {sorted(THETA)}, a table each")
    ropes = []
    for kind, (name, default) in THETA.items():
        settings = {"rope_theta": fields.get(name, default)} | (nested.get(kind) or {})
        if kind == layer_fields.FULL:
            settings |= fields.get("rope_scaling", {})
        if settings.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{fields.where}: rope_parameters[{kind!r}]: partial_rotary_factor is not supported")
        ropes.append(rope_fields.build(settings, head_dim, max_positions, fields.where))
    return tuple(ropes)


def names(fields: Fields) -> Names:
    """Torch module names."""
    bias, tied = fields.get("attention_bias", False), fields.get("tie_word_embeddings", True)
    return llama.rows(attention_bias=bias, qk_norm=True, norms=gemma2.NORMS, tied=tied)
