"""Rotary tables against those of `transformers`, for every scaling it knows, in the old spelling and the new."""

import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxft.models import families, rope
from jaxft.models.rope import Rope

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# How a config.json says it -> positions reached by the batch. Each is read by both.
LLAMA: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({}, 40),
    "theta": ({"rope_theta": 5e5}, 40),
    "default": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 40),
    "linear": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}, 40),
    "linear, old": ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, 40),
    "dynamic, short": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 40),
    "dynamic, long": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 200),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, 40),
    "llama3, old": ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 40),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 40),
    "yarn, both names of the type": (
        {"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        40,
    ),
    "yarn, original length beside": (
        {"original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
        40,
    ),
    "yarn, all settings": (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
                "truncate": False,
            }
        },
        40,
    ),
    "yarn, attention factor": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, "beta_fast": 16}},
        40,
    ),
    "yarn, no feature turns as slowly as beta_slow": (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "beta_slow": 2.0,
                "truncate": False,
            }
        },
        40,
    ),
    "longrope, short": (
        {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}},
        32,
    ),
    "longrope, long": (
        {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}},
        33,
    ),
    "longrope, factor": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 32, **FACTORS}},
        40,
    ),
}
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "gpt_neox": ({}, 40),
    "gpt_neox, old": ({"rotary_pct": 0.5, "rotary_emb_base": 20000}, 40),
    "gpt_neox, old, repeated": ({"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 10000}, 40),
    "gpt_neox, new": ({"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.75}}, 40),
    "gpt_neox, scaled": ({"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 40),
    "phi3, partly": ({"partial_rotary_factor": 0.5, "rope_theta": 500.0}, 40),
    "phi3, old": (
        {"original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope", **FACTORS}, "rope_theta": 500.0},
        40,
    ),
    "phi3, partly long": (
        {
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [3.0] * 6},
        },
        40,
    ),
    "smollm3": ({}, 40),
    "qwen2": ({"rope_theta": 1e6}, 40),
}


def expected(raw: dict[str, Any], positions: np.ndarray, kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of `transformers`, first halves (the second repeat them): [B, T, dim / 2]."""
    raw = {**raw, "rope_scaling": dict(raw["rope_scaling"])} if raw.get("rope_scaling") else raw
    family = raw["model_type"]
    config = transformers.AutoConfig.for_model(**raw)
    package = family.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    stem = type(config).__name__.removesuffix("Config").removesuffix("Text")
    table = getattr(module, f"{stem}RotaryEmbedding")(config)
    args = () if kind is None else (kind,)
    cos, sin = table(torch.zeros(1), torch.as_tensor(positions), *args)
    half = cos.shape[-1] // 2
    return cos[..., :half].numpy(), sin[..., :half].numpy()


def same(table: Rope, raw: dict[str, Any], length: int, kind: str | None = None) -> None:
    positions = np.stack([np.arange(length), np.arange(length)[::-1]])
    for got, wanted in zip(rope.table(table, jnp.asarray(positions)), expected(raw, positions, kind), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", LLAMA)
def test_llama(case):
    settings, length = LLAMA[case]
    raw = {"model_type": "llama", **SIZES, **settings}
    (table,) = families.read(raw)[0].ropes
    same(table, raw, length)


@pytest.mark.parametrize("case", OTHERS)
def test_other_families(case):
    settings, length = OTHERS[case]
    family = case.partition(",")[0]
    heads = {"num_key_value_heads": 2} if family == "qwen2" else {}  # its default is 32, more than the heads here
    raw = {"model_type": family, **SIZES, **heads, **settings}
    (table,) = families.read(raw)[0].ropes
    same(table, raw, length)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rope_theta": 2e6, "rope_local_base_freq": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5}}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}},
    ],
    ids=["nothing", "old", "new", "new, local"],
)
def test_gemma3_has_a_table_for_each_kind(settings):
    raw = {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}
    raw |= settings
    config, _ = families.read(raw)
    assert [layer.rope for layer in config.layers] == [1, 0]
    for table, kind in zip(config.ropes, ("full_attention", "sliding_attention"), strict=True):
        same(table, raw, 40, kind)


def test_proportional():
    """A table of whole heads whose last frequencies are zero."""
    settings = {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5, "factor": 2.0}
    raw = {"model_type": "phi3", **SIZES, "rope_parameters": settings}
    (table,) = families.read(raw)[0].ropes
    config = transformers.LlamaConfig(**SIZES, rope_parameters=dict(settings))
    frequencies, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["proportional"](config)
    np.testing.assert_allclose(rope.inverse_frequencies(table), frequencies.numpy(), rtol=1e-6)


def test_what_is_not_rotated_passes_through(key):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 12)), jnp.float32)
    cos, sin = rope.table(Rope(8), jnp.arange(5)[None])
    turned = rope.rotate(x, cos, sin)
    assert bool(jnp.all(turned[..., 8:] == x[..., 8:]))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


REFUSED = {
    "an unknown type": ({"rope_type": "spiral"}, "spiral"),
    "a setting of another type": ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast"),
    "an unknown setting": ({"rope_type": "default", "mrope_section": [2, 3, 3]}, "mrope_section"),
    "too few factors": ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}, "short_factor"),
    "part of a head": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "no factor": ({"rope_type": "dynamic"}, "factor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    settings, named = REFUSED[case]
    with pytest.raises(ValueError, match=named):
        families.read({"model_type": "llama", **SIZES, "rope_parameters": settings})
