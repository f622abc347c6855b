"""A model made ready for decoding is the model it was made from; the kernel's product is the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft, quant
from jaxft.core import tree
from jaxft.model import Model
from jaxft.models import families, init
from jaxft.rollout import few, generate
from jaxft.rollout.generate import GenerateConfig
from tests.models import tiny
from tests.models.test_consistency import pair

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]
GREEDY = GenerateConfig(6, 0.0)


@pytest.mark.parametrize("rows", [1, 5, 16, 33])
@pytest.mark.parametrize(("inner", "outer", "tiles"), [(256, 128, (64, 64, 2)), (128, 64, (32, 64, 1))])
def test_product(rows, inner, outer, tiles):
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(rows, inner), (inner, outer)]))
    got = few.product(x, w, *tiles, interpret=True)
    np.testing.assert_allclose(got, x @ w, atol=1e-4)


def test_tiles_divide_or_there_are_none():
    assert few.tiling(2048, 16384) == (128, 64, 1)
    for inner, outer in ((8192, 2048), (2048, 3072), (2048, 2048), (4096, 28672), (14336, 4096), (960, 320)):
        if (tiles := few.tiling(inner, outer)) is not None:
            columns, depth, parts = tiles
            assert outer % columns == 0 and inner % (depth * parts) == 0
    assert few.tiling(2048, 2049) is None and few.tiling(33, 2048) is None


@pytest.mark.parametrize("name", ["llama_bias", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"])
def test_a_prepared_model_says_the_same(name):
    """Separate projections and fused ones, with biases and without, gated and not, a period of two."""
    _, loaded = pair(name)
    config, params = few.prepared(loaded.config, loaded.params)
    leaves = jax.tree.leaves(params["layers"], is_leaf=lambda w: isinstance(w, few.Few))
    assert len([w for w in leaves if isinstance(w, few.Few)]) == 4 if config.gated_mlp else 3
    (a, b) = (
        generate.generate(c, p, PROMPTS, GREEDY, ()) for c, p in ((loaded.config, loaded.params), (config, params))
    )
    for one, other in zip(a, b, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logp, other.logp, atol=2e-5)


@pytest.fixture(scope="module")
def model():
    raw = {"model_type": "qwen2", **tiny.SIZES}
    config, names = families.read(raw)
    return Model(config, init.random(config, names, jax.random.key(0), jnp.float32, 0.3), names, raw)


def moved(params):
    """Adapters that are not the identity."""
    trainable, frozen = tree.partition(params, tree.trainable_mask(params))
    return tree.combine(jax.tree.map(lambda a: a + 0.02, trainable), frozen)


@pytest.mark.parametrize(
    "methods",
    [
        [peft.LoRA(rank=2)],
        [peft.DoRA(rank=2)],
        [peft.LoRA(rank=2, targets=("q_proj",), layers=(1,)), peft.LoRA(rank=2, targets=("down_proj", "lm_head"))],
        [peft.IA3()],
    ],
)
def test_adapters_worked_in(model, methods):
    params = moved(peft.adapt(model, jax.random.key(1), methods))
    assert few.merges(params)
    merged = few.merged(params)
    assert not any(w.adapter for _, w in tree.paths(merged, inside=False) if hasattr(w, "adapter"))
    rows = jax.random.randint(jax.random.key(2), (2, 9), 0, 97)
    np.testing.assert_allclose(model.logprobs(merged, rows), model.logprobs(params, rows), atol=5e-5)


def test_what_cannot_be_worked_in_is_left(model):
    assert not few.merges(model.params)
    for method in (peft.PromptTuning(tokens=2), peft.PrefixTuning(tokens=2)):
        assert not few.merges(peft.adapt(model, jax.random.key(1), method))
    wide = {**tiny.SIZES, "hidden_size": 64, "intermediate_size": 64}
    config, names = families.read({"model_type": "llama", **wide})
    packer = quant.chosen(quant.QuantConfig("nf4")).packer
    base = Model(config, init.random(config, names, jax.random.key(0), jnp.float32, pack=packer), names, {})
    assert not few.merges(peft.adapt(base, jax.random.key(1), peft.LoRA(rank=2)))
    settings = GenerateConfig(4, 0.0)
    params = peft.adapt(model, jax.random.key(1), peft.PromptTuning(tokens=2))
    a, b = (generate.generate(model.config, params, PROMPTS, settings, (), merge=merge) for merge in (False, True))
    assert [c.tokens for c in a] == [c.tokens for c in b]
