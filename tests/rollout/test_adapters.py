"""Adapters side by side and one after the other, on a whole model: one compiled program for all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import peft
from jaxft.core.weight import InPlace
from jaxft.model import Model
from jaxft.models import families, init
from jaxft.rollout import generate
from jaxft.rollout.generate import GenerateConfig
from tests.training.tiny import compiles

RAW = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
GREEDY = GenerateConfig(max_new_tokens=6, temperature=0.0)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 6, 7]]


@pytest.fixture(scope="module")
def model():
    config, names = families.read(RAW)
    return Model(config, init.random(config, names, jax.random.key(0), jnp.float32, 0.3), names, RAW)


@pytest.fixture(scope="module")
def adapters(model):
    """Different in rank and in targets, none of them the identity."""
    methods = (
        peft.LoRA(rank=2, dropout=0.1),
        peft.LoRA(rank=4, targets=("q_proj", "down_proj"), layers=(1,)),
        peft.LoRA(rank=3, targets=("v_proj",), rank_pattern={"0.self_attn.v_proj": 1}, bias="all"),
    )
    return [moved(peft.adapt(model, jax.random.key(i), method)) for i, method in enumerate(methods)]


def moved(params):
    """The parameters with other than zeros in B."""

    def one(w):
        if isinstance(w, InPlace):
            return dataclasses.replace(w, value=w.value + 0.1)
        if not isinstance(w, peft.LoRAWeight):
            return w
        real = jnp.arange(w.b.shape[-2]) < w.rank[..., None]
        return dataclasses.replace(w, b=jnp.where(real[..., None], jnp.cos(jnp.arange(w.b.size)).reshape(w.b.shape), 0))

    return jax.tree.map(one, params, is_leaf=lambda w: isinstance(w, peft.LoRAWeight | InPlace))


def test_rows_with_different_adapters_equal_each_alone(model, adapters):
    stack = jaxft.stack_adapters(adapters)
    tokens = jax.random.randint(jax.random.key(1), (5, 12), 0, 64)
    segments = np.where(np.arange(12) < 7, 1, 2) * np.ones((5, 1), int)
    ids, alone = [2, 0, -1, 1, 0], [*adapters, model.params]
    got = model.logprobs(stack, tokens, segments, adapters=ids)
    for row, i in enumerate(ids):
        want = model.logprobs(alone[i], tokens[row : row + 1], segments[row : row + 1])[0]
        np.testing.assert_allclose(got[row], want, atol=1e-5)
    assert np.abs(got[1] - got[4]).max() > 0.1 and np.abs(got[0] - got[3]).max() > 0.1

    ids = [0, 1, 2, -1]
    made = generate.generate(model.config, stack, PROMPTS, GREEDY, [1], adapters=ids)
    assert made[0].tokens != made[3].tokens  # the same prompt
    for row in (1, 3):
        (want,) = generate.generate(model.config, alone[ids[row]], [PROMPTS[row]], GREEDY, [1])
        assert made[row].tokens == want.tokens
        np.testing.assert_allclose(made[row].logp, want.logp, atol=1e-4)


def test_other_rows_and_other_adapters_compile_nothing(model, adapters):
    """Which rows use what, and a swapped adapter, are data."""
    tokens = jax.random.randint(jax.random.key(1), (3, 10), 0, 64)
    stack = jaxft.stack_adapters(adapters[:2])
    model.logprobs(stack, tokens, adapters=[0, 1, -1])
    model.logprobs(adapters[0], tokens)
    small = moved(peft.adapt(model, jax.random.key(7), peft.LoRA(rank=1, dropout=0.2)))
    want = model.logprobs(small, tokens)
    swapped = jaxft.swap(adapters[0], small)
    with compiles("_logprobs") as compiled:
        model.logprobs(stack, tokens, adapters=[1, 1, 0])
        got = model.logprobs(swapped, tokens)
    assert compiled == []
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - model.logprobs(adapters[0], tokens)).max() > 0.1


def test_how_the_scale_was_made_does_not_part_adapters(model):
    """rsLoRA and LoRA: the scale is a number of the weight."""
    methods = (peft.LoRA(rank=4, rslora=True), peft.LoRA(rank=2))
    both = [moved(peft.adapt(model, jax.random.key(i), method)) for i, method in enumerate(methods)]
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 64)
    stacked = model.logprobs(jaxft.stack_adapters(both), tokens, adapters=[0, 1])
    for row, params in enumerate((both[0], jaxft.swap(*both))):
        np.testing.assert_allclose(stacked[row], model.logprobs(params, tokens)[row], atol=1e-5)
    np.testing.assert_allclose(stacked[1], model.logprobs(both[1], tokens)[1], atol=1e-5)


def test_refusals(model, adapters):
    with pytest.raises(ValueError, match=r"swap: layers/attn/k/.*: the other adapter has more targets"):
        jaxft.swap(adapters[1], adapters[0])
    with pytest.raises(ValueError, match=r"swap: layers/attn/q/.*: .* larger rank \(\(2, 32, 4\) for \(2, 32, 2"):
        jaxft.swap(adapters[0], adapters[1])
    with pytest.raises(ValueError, match="stack_adapters: got no adapters"):
        jaxft.stack_adapters([])
    with pytest.raises(ValueError, match=r"adapters: got \[3\]; expected .* 0 to 2, or -1 for the base"):
        model.logprobs(jaxft.stack_adapters(adapters), jnp.zeros((1, 5), int), adapters=[3])
    with pytest.raises(ValueError, match=r"which row uses which is not known; say it with jaxft\.for_rows"):
        model.logprobs(jaxft.stack_adapters(adapters), jnp.zeros((4, 5), int))
    other = dataclasses.replace(model, params=jax.tree.map(jnp.copy, model.params))
    with pytest.raises(ValueError, match="bases are different arrays"):
        jaxft.stack_adapters([adapters[0], peft.adapt(other, jax.random.key(0), peft.LoRA(rank=2))])
    with pytest.raises(ValueError, match="2 adapters for 4 prompts"):
        generate.generate(model.config, jaxft.stack_adapters(adapters), PROMPTS, GREEDY, [1], adapters=[0, 1])
