"""A prompt and a prefix in the decoder: packing, remat, unrolling, vmap and decoding change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import tree
from jaxft.models import decoder, heads, slots
from jaxft.models.decoder import Execution
from jaxft.rollout import generate, score
from jaxft.rollout.generate import GenerateConfig
from tests.peft import pairs

N, P = 3, 8  # lengths of the prompt and of the prefix, which is longer than mistral's window of 6
LENGTHS = (7, 4, 9)
BOTH = ("prompt", "prefix")


def with_slots(name: str, which: tuple[str, ...] = BOTH, tasks: int = 1) -> tree.Params:
    """The model with random slots, as plain arrays."""
    loaded = pairs.ours(name)
    config, rng = loaded.config, np.random.default_rng(0)
    shapes = {
        "prompt": (tasks, N, config.hidden_size),
        "prefix": (config.num_layers, 2, P, config.num_kv_heads, config.head_dim),
    }
    return {**loaded.params, **{n: jnp.asarray(rng.normal(size=shapes[n]), jnp.float32) for n in which}}


@functools.cache
def scorer(name: str, execution: Execution = decoder.DEFAULT):
    run = score.make_score(pairs.ours(name).config, dtype=jnp.float32, execution=execution)
    return jax.jit(lambda params, batch: run("policy", params, batch)["logp"])


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, 97, n).astype(np.int32) for n in LENGTHS]


def packed(before: int) -> dict[str, np.ndarray]:
    """The documents in one row, `before` positions reserved in front of each, and padding; a second row of one."""
    rows = [documents(), documents()[:1]]
    batch = {
        name: np.zeros((2, sum(LENGTHS) + 3 * before + 4), np.int32) for name in ("tokens", "segments", "positions")
    }
    for row, held in enumerate(rows):
        at = 0
        for number, tokens in enumerate(held, 1):
            end = at + before + len(tokens)
            batch["tokens"][row, at + before : end] = tokens
            batch["segments"][row, at:end] = number
            batch["positions"][row, at:end] = np.arange(end - at)
            at = end
    return batch


@pytest.mark.parametrize(
    ("name", "which"),
    [("llama", ("prompt",)), ("llama", ("prefix",)), ("gemma2", BOTH), ("gpt2", BOTH), ("mistral", BOTH)],
)
def test_packed_documents_have_their_solo_log_probs(name, which):
    """0 at the prompt's positions and at each first token, whether forward adds the prompt or the row has room."""
    params, before = with_slots(name, which), N if "prompt" in which else 0
    together = np.asarray(scorer(name)(params, packed(before)))
    expected = np.zeros_like(together)
    at = 0
    for tokens in documents():
        alone = np.asarray(scorer(name)(params, {"tokens": np.pad(tokens, (0, 9 - len(tokens)))[None]}))[0]
        at += before
        expected[0, at : at + len(tokens)] = alone[: len(tokens)]
        at += len(tokens)
    expected[1, : before + LENGTHS[0]] = expected[0, : before + LENGTHS[0]]
    np.testing.assert_allclose(together, expected, atol=2e-5)
    assert np.count_nonzero(together[0]) == sum(LENGTHS) - 3
    plain = np.asarray(scorer(name)(pairs.ours(name).params, packed(0)))
    assert np.abs(plain[plain != 0] - together[together != 0]).max() > 0.05


def test_each_document_has_the_prompt_of_its_task():
    params, batch = with_slots("llama", ("prompt",), tasks=3), packed(N)
    tasks = np.maximum(batch["segments"] - 1, 0)
    together = np.asarray(scorer("llama")(params, {**batch, "task_ids": tasks}))[0]
    at = 0
    for task, tokens in enumerate(documents()):
        own = {"tokens": tokens[None], "task_ids": np.full((1, len(tokens)), task, np.int32)}
        alone = np.asarray(scorer("llama")(params, own))[0]
        at += N
        np.testing.assert_allclose(together[at : at + len(tokens)], alone, atol=2e-5)
        one = {**params, "prompt": params["prompt"][task : task + 1]}
        np.testing.assert_allclose(alone, np.asarray(scorer("llama")(one, {"tokens": tokens[None]}))[0], atol=1e-6)
        at += len(tokens)


def gradients(name: str, execution: Execution):
    """Of the sum of log-probs of the packed rows, with respect to the slots."""
    params, batch = with_slots(name), packed(N)
    run = score.make_score(pairs.ours(name).config, dtype=jnp.float32, execution=execution)

    def loss(own):
        return jnp.sum(run("policy", {**params, **own}, batch)["logp"])

    return jax.jit(jax.value_and_grad(loss))({n: params[n] for n in BOTH})


def test_unrolled_and_rematerialised_give_the_same():
    """gemma2 is scanned by a period of two."""
    expected = gradients("gemma2", Execution())
    for execution in (Execution(unroll=True), Execution(remat="save"), Execution(remat="full")):
        for a, b in zip(jax.tree.leaves(gradients("gemma2", execution)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_many_slots_are_one_vmap():
    params, batch = with_slots("llama"), packed(N)
    own = {n: jnp.stack([params[n], -params[n]]) for n in BOTH}
    both = jax.vmap(lambda own: scorer("llama")({**params, **own}, batch))(own)
    for i in range(2):
        alone = scorer("llama")({**params, **{n: own[n][i] for n in BOTH}}, batch)
        np.testing.assert_allclose(both[i], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "which"), [("llama", ("prompt",)), ("llama", ("prefix",)), ("gemma2", BOTH), ("gpt2", BOTH)]
)
def test_greedy_text_with_a_cache_is_that_of_full_recomputation(name, which):
    """Prompts of unequal length in one batch, and the stream of one."""
    loaded, params = pairs.ours(name), with_slots(name, which)
    prompts, settings = [d.tolist() for d in documents()[:2]], GenerateConfig(6, temperature=0.0)
    made = generate.generate(loaded.config, params, prompts, settings, ())
    streamed = list(generate.stream(loaded.config, params, prompts[1], settings, ()))
    for prompt, completion in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for _ in range(settings.max_new_tokens):
            row = np.pad(np.array(tokens, np.int32), (0, 20 - len(tokens)))[None]
            tokens.append(int(np.argmax(pairs.logits(name, params, row)[0, len(tokens) - 1])))
        assert completion.tokens == tokens[len(prompt) :]
    assert streamed == made[1].tokens


def test_generation_takes_the_prompt_of_the_task():
    loaded, params = pairs.ours("llama"), with_slots("llama", ("prompt",), tasks=2)
    prompt, settings = documents()[0].tolist(), GenerateConfig(8, temperature=0.0)
    made = generate.generate(loaded.config, params, [prompt] * 2, settings, (), tasks=[1, 0])
    for task, completion in zip((1, 0), made, strict=True):
        one = {**params, "prompt": params["prompt"][task : task + 1]}
        assert completion.tokens == generate.generate(loaded.config, one, [prompt], settings, ())[0].tokens
    assert made[0].tokens != made[1].tokens
    with pytest.raises(ValueError, match="got tasks 0 to 2; the model has a prompt for 2"):
        generate.generate(loaded.config, params, [prompt] * 2, settings, (), tasks=[0, 2])


def test_positions_that_the_model_lacks_are_refused():
    loaded, params = pairs.ours("gpt2"), with_slots("gpt2")
    settings = GenerateConfig(64 - 4 - N - P + 1)
    with pytest.raises(ValueError, match=r"65 positions .* what is learnt before them"):
        generate.generate(loaded.config, params, [[5, 6, 7, 8]], settings, ())


def test_make_room():
    tokens = np.array([[0, 5, 6, 7, 8, 9], [5, 6, 7, 0, 0, 0]], np.int32)
    segments = np.array([[0, 1, 1, 2, 2, 3], [1, 1, 1, 0, 0, 0]], np.int32)
    wide, numbers, index = score.make_room(tokens, segments, 2)
    assert wide.tolist() == [[0, 0, 0, 5, 6, 0, 0, 7, 8, 0, 0, 9], [0, 0, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0]]
    assert numbers.tolist() == [[0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert np.take_along_axis(wide, index, 1).tolist() == tokens.tolist()


def test_capture_leaves_the_prompt_out():
    params = with_slots("llama")
    hidden, _, captured = decoder.forward(
        pairs.ours("llama").config, params, jnp.asarray(documents()[0])[None], capture=("layers",)
    )
    assert hidden.shape == (1, 7, 32) and captured["layers"].shape == (3, 1, 7, 32)
    assert slots.prompt_length(params) == N and slots.prefix_length(params) == P
    assert heads.head_of(pairs.ours("llama").config, params) is params["head"]
