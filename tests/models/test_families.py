"""Reading config.json: published ones, old formats and new, the defaults of absent fields, and refusal by name of
everything that is not understood."""

import copy
from typing import Any

import jax
import pytest
import transformers

from jaxft.models import families, init
from jaxft.models.config import Layer, ModelConfig
from tests.models import tiny
from tests.models.published import PUBLISHED

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
}
GPT2_SIZES = {"vocab_size": 64, "n_embd": 64, "n_layer": 12, "n_head": 4}


def minimal(family: str) -> dict[str, Any]:
    """The least a config.json of the family may say."""
    return {"model_type": family, **(GPT2_SIZES if family == "gpt2" else SIZES)}


def completed(raw: dict[str, Any]) -> dict[str, Any]:
    """The same config as today's `transformers` understands and writes it."""
    return transformers.AutoConfig.for_model(**copy.deepcopy(raw)).to_dict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    """Understood as they stand, and the same as what `transformers` makes of them."""
    raw = PUBLISHED[name]
    config, names = families.read(raw)
    assert (config, names) == families.read(completed(raw))
    assert config.num_layers == raw.get("num_hidden_layers", raw.get("n_layer"))


# Parameters without the head's copy of a tied embedding, counted by the authors or by `transformers`.
COUNTS = {
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-3.2-1B": 1_235_814_400,
    "SmolLM2-135M": 134_515_008,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "gpt2": 124_439_808,
    "pythia-70m": 70_426_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b-it": 999_885_952,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-4-mini-instruct": 3_836_021_760,
    "SmolLM3-3B": 3_075_098_624,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    config, names = families.read(PUBLISHED[name])
    abstract = jax.eval_shape(lambda: init.random(config, names, jax.random.key(0), "float32"))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == COUNTS[name]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_absent_fields_are_what_transformers_takes_them_for(family):
    raw = minimal(family)
    assert families.read(raw) == families.read(completed(raw))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_what_transformers_writes_is_understood(name):
    """config.json as it is saved, which leaves out what equals a default, and the whole dictionary."""
    config = tiny.CONFIGS[name]()
    config, saved = families.read(config.to_dict()), families.read(config.to_diff_dict())
    assert config == saved


def kinds(raw: dict[str, Any]) -> tuple[Layer, ...]:
    return families.read(raw)[0].layers


def test_layer_kinds():
    """Windows and rotary tables layer by layer, from each spelling."""
    full, slide = Layer(), Layer(window=8)
    qwen = {**minimal("qwen2"), "num_hidden_layers": 4, "sliding_window": 8, "max_window_layers": 3}
    assert kinds(qwen) == (full,) * 4
    assert kinds({**qwen, "use_sliding_window": True}) == (full, full, full, slide)
    named = ["sliding_attention", "full_attention"] * 2
    assert kinds({**qwen, "use_sliding_window": True, "layer_types": named}) == (slide, full, slide, full)
    gemma = {**minimal("gemma2"), "num_hidden_layers": 4, "sliding_window": 8}
    assert kinds(gemma) == (slide, full, slide, full)
    gemma3 = {**minimal("gemma3_text"), "num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 3}
    local = Layer(window=8, rope=1)
    assert kinds(gemma3) == (local, local, full, local)
    smol = {**minimal("smollm3"), "num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0, 1]}
    nope = Layer(rope=None)
    assert kinds(smol) == (nope, full, full, nope)
    assert kinds({**smol, "no_rope_layers": None, "no_rope_layer_interval": 2}) == (full, nope, full, nope)
    sliding = {**smol, "use_sliding_window": True, "sliding_window": 8}
    assert kinds(sliding) == (Layer(window=8, rope=None), full, full, Layer(window=8, rope=None))


def test_periods():
    """What a scan repeats: the shortest run of kinds that makes up the depth."""

    def period(*windows: int | None) -> int:
        layers = tuple(Layer(window=w) for w in windows)
        return ModelConfig("llama", 1, 1, 1, 1, 1, 1, layers).period

    assert period(None) == 1
    assert period(None, None, None) == 1
    assert period(8, None, 8, None) == 2
    assert period(8, 8, None, 8, 8, None) == 3
    assert period(8, 8, None, 8) == 4


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_unknown_field_is_refused_by_name(family):
    raw = {**completed(minimal(family)), "attention_twist": 3}
    with pytest.raises(ValueError, match=r"attention_twist=3"):
        families.read(raw, "somewhere/config.json")
    families.read({**raw, "attention_twist": None})
    with pytest.raises(ValueError, match=r"somewhere/config\.json"):
        families.read(raw, "somewhere/config.json")


NESTED = {"full_attention": {"rope_type": "default"}, "rope_theta": 500.0}
UNSUPPORTED = [
    ("llama", "hidden_act", "xielu"),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "rope_interleaved", True),
    ("llama", "per_layer_config", {"0": {"num_key_value_heads": 1}}),
    ("mistral", "attention_bias", True),
    ("mistral", "layer_types", ["full_attention"] * 12),
    ("qwen2", "attention_bias", False),
    ("qwen2", "use_mrope", True),
    ("qwen2", "layer_types", ["sliding_attention"] * 12),  # without use_sliding_window: no window
    ("qwen2", "layer_types", ["full_attention"] * 11),
    ("qwen3", "layer_types", ["linear_attention"] * 12),
    ("qwen3", "mlp_bias", True),
    ("qwen3", "num_experts", 8),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "n_ctx", 7),
    ("gpt2", "n_special", 3),
    ("gpt2", "activation_function", "quick_gelu"),
    ("gpt_neox", "rope_theta", 500.0),
    ("gpt_neox", "num_key_value_heads", 2),
    ("gemma2", "use_bidirectional_attention", True),
    ("gemma2", "sliding_window_size", 7),
    ("gemma2", "hidden_activation", "relu6"),
    ("gemma3_text", "use_bidirectional_attention", True),
    ("gemma3_text", "rope_parameters", NESTED),
    ("gemma3_text", "layer_types", ["chunked_attention"] * 12),
    ("phi3", "full_attn_mod", 2),
    ("phi3", "lm_head_bias", True),
    ("phi3", "num_local_experts", 16),
    ("olmo2", "clip_qkv", 8.0),
    ("olmo2", "mlp_bias", True),
    ("granite", "num_local_experts", 4),
    ("granite", "normalization_function", "layernorm"),
    ("smollm3", "no_rope_layers", [1, 0]),
    ("smollm3", "qk_norm", True),
]


@pytest.mark.parametrize(("family", "field", "value"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(family, field, value):
    with pytest.raises(ValueError, match=field):
        families.read({**minimal(family), field: value})


def test_every_family_refuses_something_it_knows():
    assert {family for family, _, _ in UNSUPPORTED} == set(families.FAMILIES)


def test_unknown_family_and_missing_field():
    with pytest.raises(ValueError, match=r"'lama'.*nearest: llama"):
        families.read({**SIZES, "model_type": "lama"})
    with pytest.raises(ValueError, match=r"'hidden_size' is missing"):
        families.read({"model_type": "llama", "num_attention_heads": 4})


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 3, "num_attention_heads": 4},
        {"num_hidden_layers": 0},
        {"head_dim": 7},
        {"vocab_size": 0},
        {"is_encoder_decoder": True},
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_no_decoder_can_be_is_refused(change):
    raw = {
        "model_type": "llama", "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    families.read(raw)
    with pytest.raises(ValueError, match=r"config\.json"):
        families.read({**raw, **change})
