"""Decoding over packed layers that are read where they lie."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxft
from jaxft import peft
from jaxft.core import indexed, tree
from jaxft.core.weight import is_packed
from jaxft.model import Model
from jaxft.models import families, init
from jaxft.quant import QuantConfig, kernels
from jaxft.rollout import generate
from jaxft.rollout.generate import GenerateConfig

RAW = {"model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
       "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
       "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
PROMPTS = [[5, 6, 7], [8, 9, 3, 12, 11, 7, 2, 4, 9, 10]]


@pytest.fixture(scope="module")
def model():
    config, names = families.read(RAW)
    pack = QuantConfig(method="nf4").packer
    return config, names, init.random(config, names, jax.random.key(0), jnp.bfloat16, 0.3, pack=pack)


@pytest.mark.parametrize("adapted", [0, 1, 2])
def test_the_same_tokens(model, monkeypatch, adapted):
    """By period, in prefill and decoding, with an adapter too; stacked adapters are left as they are."""
    config, names, params = model
    settings, how = GenerateConfig(max_new_tokens=5, temperature=0.0), {}
    if adapted:
        adapter = peft.adapt(Model(config, params, names, RAW), jax.random.key(1), peft.LoRA(rank=2))
        moved = jax.tree.map(
            lambda w: dataclasses.replace(w, b=w.b + 0.1) if isinstance(w, peft.LoRAWeight) else w,
            adapter, is_leaf=lambda w: isinstance(w, peft.LoRAWeight),
        )  # fmt: skip
        params = moved
        if adapted == 2:
            params, how = jaxft.stack_adapters([moved, adapter]), {"adapters": [1, 0]}
    apart = generate.generate(config, params, PROMPTS, settings, [], **how)
    assert not any(map(indexed.is_indexed, jax.tree.leaves(indexed.in_place(params), is_leaf=is_packed)))

    looked = []
    at = kernels.product_at
    monkeypatch.setattr(kernels, "available", lambda capability=8.0: True)
    monkeypatch.setattr(kernels, "dense", lambda w: w.remade())
    monkeypatch.setattr(kernels, "few", lambda x, w, stacked=False: stacked and x.shape[-2] == 1)
    monkeypatch.setattr(kernels, "product_at", lambda x, w, i: looked.append(w.shape) or at(x, w, i))
    held = indexed.in_place(params["layers"])
    count = sum(map(indexed.is_indexed, jax.tree.leaves(held, is_leaf=indexed.is_indexed)))
    packed = sum(map(is_packed, jax.tree.leaves(params["layers"], is_leaf=is_packed)))
    assert packed >= 7 and count == (0 if adapted == 2 else packed)
    jax.clear_caches()
    in_place = generate.generate(config, params, PROMPTS, settings, [], **how)
    assert [c.tokens for c in in_place] == [c.tokens for c in apart]
    assert len(looked) == count * config.period and all(shape[0] == config.num_layers for shape in looked)
    jax.clear_caches()


def test_a_layer_is_its_own(model):
    stack = tree.get(model[2], "layers/mlp/up")
    layer = indexed.at(indexed.Indexed(stack)[3], 2)
    alone = stack[2]
    x = jax.random.normal(jax.random.key(3), (3, 64), jnp.bfloat16)
    assert layer.shape == alone.shape and layer.dtype == alone.dtype and layer.dense_dtype == jnp.bfloat16
    for got, want in ((layer.dense(), alone.dense()), (x @ layer, x @ alone)):
        assert got.dtype == want.dtype
        assert jnp.array_equal(got, want)
