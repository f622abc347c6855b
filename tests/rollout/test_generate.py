"""Generation by continuous batching: what a completion is does not depend on who else is generated beside it."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft
from jaxft.core import tree
from jaxft.model import Model
from jaxft.models import families, init
from jaxft.models.decoder import Execution
from jaxft.rollout import decode, engine, generate
from jaxft.rollout.generate import GenerateConfig
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.sharding.mesh import MeshConfig

RAW = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
PROMPTS = [[5 + i, 6, *range(7, 7 + 5 * i)] for i in range(7)]
SAMPLED = GenerateConfig(max_new_tokens=40, temperature=1.0, batch=3)
END = [1, 2, 3]


@pytest.fixture(scope="module")
def model():
    config, names = families.read(RAW)
    return Model(config, init.random(config, names, jax.random.key(0), jnp.float32, 0.3), names, RAW)


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt's two samples, generated with nobody beside it."""
    settings = dataclasses.replace(SAMPLED, batch=1)
    made = []
    for i, prompt in enumerate(PROMPTS):
        made += generate.generate(model.config, model.params, [prompt], settings, END, samples=2, seeds=[i])
    return made


def same(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert (a.tokens, a.finished) == (b.tokens, b.finished)
        np.testing.assert_allclose(a.logp, b.logp, atol=tolerance)
        np.testing.assert_allclose(a.policy_logp, b.policy_logp, atol=tolerance)


@pytest.mark.parametrize("batch", [2, 3, 16])
def test_company_changes_nothing(model, alone, batch):
    """Seven prompts of unequal length with two samples each, in fewer rows than samples and in more."""
    settings = dataclasses.replace(SAMPLED, batch=batch)
    how = {"samples": 2, "seeds": range(len(PROMPTS))}
    same(generate.generate(model.config, model.params, PROMPTS, settings, END, **how), alone)
    assert len({c.finished for c in alone}) == 2 and len({len(c.tokens) for c in alone}) > 3


def test_chunks_sent_ahead_change_nothing(model, alone, monkeypatch):
    """What a row does after its end is not heard, and harms nobody."""
    monkeypatch.setattr(engine, "AHEAD", {"cpu": 2})
    how = {"samples": 2, "seeds": range(len(PROMPTS))}
    same(generate.generate(model.config, model.params, PROMPTS, SAMPLED, END, **how), alone)


def test_unrolled_layers(model, alone):
    params = tree.split_layers(model.params)
    how = {"samples": 2, "seeds": range(len(PROMPTS)), "execution": Execution(unroll=True)}
    same(generate.generate(model.config, params, PROMPTS, SAMPLED, END, **how), alone)


@pytest.mark.parametrize("sizes", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_on_a_mesh(model, alone, sizes):
    """Rows over devices, each with pages of its own."""
    mesh = mesh_.create(sizes)
    params = jax.device_put(model.params, rules.shardings(model.params, mesh))
    how = {"samples": 2, "seeds": range(len(PROMPTS)), "execution": Execution(mesh=mesh)}
    same(generate.generate(model.config, params, PROMPTS, SAMPLED, END, **how), alone)


def test_nothing_is_compiled_for_other_prompts_or_settings(model):
    """Values of the settings, lengths within a bucket, when rows end."""
    run = lambda prompts, **own: generate.generate(  # noqa: E731
        model.config, model.params, prompts, dataclasses.replace(SAMPLED, **{"top_k": 5, **own}), END
    )
    run(PROMPTS[1:5])
    before = decode.decode._cache_size(), decode.read._cache_size()
    run(PROMPTS[1:5], temperature=0.3, top_k=9, seed=5)
    run([p[:-1] for p in PROMPTS[1:5]], max_new_tokens=39)
    assert (decode.decode._cache_size(), decode.read._cache_size()) == before


def test_a_prompt_is_read_once_for_all_its_samples(model, monkeypatch):
    """And its full pages are held once: here two of three."""
    read, real = Counter(), decode.read
    monkeypatch.setattr(decode, "read", lambda plan, params, cache, laid: (
        read.update(prompts=int((laid.segments_RT.sum(1) > 0).sum())), real(plan, params, cache, laid))[1])  # fmt: skip
    held = []
    real_send = engine.Engine._send

    def send(self, chunk):
        held.append(sum(map(bool, self.shards[0].pages.holders)))
        return real_send(self, chunk)

    monkeypatch.setattr(engine.Engine, "_send", send)
    prompt = [5 + i % 50 for i in range(40)]
    made = generate.generate(model.config, model.params, [prompt], GenerateConfig(8, 1.0, batch=4), (), samples=4)
    assert read["prompts"] == 1 and len({tuple(c.tokens) for c in made}) == 4
    assert held == [2 + 4 * 1]  # 39 tokens read and 8 more are three pages of 16


def test_pages_are_given_back(model, monkeypatch):
    engines = []
    real = engine.Engine.__init__
    monkeypatch.setattr(engine.Engine, "__init__", lambda self, *a, **k: (engines.append(self), real(self, *a, **k))[1])
    generate.generate(model.config, model.params, PROMPTS, SAMPLED, END, samples=2)
    (pages,) = (shard.pages for shard in engines[0].shards)
    assert not any(pages.holders) and sorted(pages.free) == list(range(engines[0].plan.pages))


def test_told_log_probabilities_are_the_models(model, alone):
    """At temperature 1 the sampler's are the policy's; at another they are those of the tempered distribution."""
    for prompt, completion in zip(np.repeat(np.array(PROMPTS, object), 2), alone, strict=True):
        row = jnp.asarray([[*prompt, *completion.tokens]])
        logp = model.logprobs(model.params, row)[0, len(prompt) - 1 :]
        np.testing.assert_allclose(completion.policy_logp, logp, atol=1e-5)
        np.testing.assert_allclose(completion.logp, completion.policy_logp, atol=1e-6)
    warm = dataclasses.replace(SAMPLED, temperature=1.5)
    (made,) = generate.generate(model.config, model.params, [PROMPTS[3]], warm, ())
    logp = model.logprobs(model.params, jnp.asarray([[*PROMPTS[3], *made.tokens]]))[0, len(PROMPTS[3]) - 1 :]
    np.testing.assert_allclose(made.policy_logp, logp, atol=1e-5)
    assert np.abs(np.array(made.logp) - logp).max() > 0.1


class Letters:
    """Decodes token ids as letters."""

    def decode(self, tokens, **_):
        return "".join(chr(97 + token % 26) for token in tokens)


def test_stop_texts_end_a_completion(model):
    """In the middle of a chunk, over two tokens; what is left is the beginning of what was."""
    settings, letters = dataclasses.replace(SAMPLED, max_new_tokens=70), Letters()
    (free,) = generate.generate(model.config, model.params, [PROMPTS[2]], settings, (), seeds=[4])
    text = letters.decode(free.tokens)
    for at in (5, 37):
        stop = text[at : at + 2]
        own = dataclasses.replace(settings, stop=(stop, "?"))
        (made,) = generate.generate(model.config, model.params, [PROMPTS[2]], own, (), seeds=[4], tokenizer=letters)
        length = text.index(stop) + 2
        assert (made.tokens, made.finished) == (free.tokens[:length], True)
        assert made.logp == pytest.approx(free.logp[:length]) and generate.cut(text, own.stop) == text[: length - 2]
        own = dataclasses.replace(own, seed=4)
        streamed = list(generate.stream(model.config, model.params, PROMPTS[2], own, (), tokenizer=letters))
        assert stop not in letters.decode(streamed)[:-1]
    with pytest.raises(ValueError, match="no tokenizer to find them with"):
        generate.generate(model.config, model.params, PROMPTS, dataclasses.replace(settings, stop=("a",)), ())


def test_penalties_make_greedy_text_vary(model):
    """A penalty that nothing outweighs: every token at most once, and none of the prompt's."""
    own = GenerateConfig(30, 0.0, repetition_penalty=1.0, presence_penalty=1e4)
    (made,) = generate.generate(model.config, model.params, [PROMPTS[1]], own, ())
    assert len(set(made.tokens)) == 30
    own = GenerateConfig(5, 0.0, repetition_penalty=1e6)
    for completion in generate.generate(model.config, model.params, PROMPTS, dataclasses.replace(own, batch=2), ()):
        assert len(set(completion.tokens)) == 5


def test_with_an_adapter_trained_prompt_and_prefix(model):
    """As many rows as samples and fewer give the same."""
    key = jax.random.key(1)
    both = [peft.PromptTuning(tokens=3), peft.PrefixTuning(tokens=2)]
    params = peft.adapt(model, key, both)
    params = jax.tree.map(lambda a: a if a.size > 500 else a + 0.1 * jax.random.normal(key, a.shape, a.dtype), params)
    runs = [
        generate.generate(model.config, params, PROMPTS, dataclasses.replace(SAMPLED, batch=batch), END, samples=2)
        for batch in (2, 14)
    ]
    same(*runs, 1e-4)


def test_arrays_are_lists(model):
    """Prompts, seeds and tasks as arrays; of a seed, whatever its size, the last 32 bits count."""
    settings, lists = dataclasses.replace(SAMPLED, max_new_tokens=4), [[5, 6], [7, 8]]
    run = lambda prompts, **how: generate.generate(model.config, model.params, prompts, settings, END, **how)  # noqa: E731
    expected = run(lists, seeds=[2**32 - 1, 5])
    same(run(np.array(lists), seeds=np.array([-1, 5]), tasks=np.array([0, 0])), expected)
    same(run(lists, seeds=[2**70 - 1, 2**64 + 5]), expected)


def test_what_cannot_be_generated_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate.generate(model.config, model.params, [[5], []], SAMPLED, END)
    with pytest.raises(ValueError, match="got 1 seeds for 7 prompts"):
        generate.generate(model.config, model.params, PROMPTS, SAMPLED, END, seeds=[0])
    for token in (-1, 64):
        with pytest.raises(ValueError, match=f"prompt 1: got the token {token}; expected those of the model, 0 to 63"):
            generate.generate(model.config, model.params, [[5], [5, token]], SAMPLED, END)
    with pytest.raises(ValueError, match="got 0 samples"):
        generate.generate(model.config, model.params, PROMPTS, SAMPLED, END, samples=0)
    for field, value in {"min_p": 1.0, "repetition_penalty": 0.0, "stop": ("",)}.items():
        with pytest.raises(ValueError, match=rf"generate\.{field}"):
            GenerateConfig(**{field: value})
