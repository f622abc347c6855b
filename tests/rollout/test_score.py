"""Scores: aligned with the tokens, each document by itself, noise and dropout only where there is a key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft
from jaxft.core import tree
from jaxft.models import decoder, families, heads, init
from jaxft.rollout import score

V, D = 96, 32
SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama", **SIZES, "num_hidden_layers": 2},
    "gemma3_text": {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 4, "sliding_window": 3,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
}  # fmt: skip
LENGTHS = ((5, 9, 1, 6), (12, 7))  # documents of each row; the second row begins with padding, both end with it
T = 24


def model(name="llama"):
    config, names = families.read(MODELS[name])
    return config, names, init.random(config, names, jax.random.key(0), jnp.float32, 0.2)


def batch():
    """Packed rows in which no token occurs twice."""
    tokens = np.random.default_rng(0).permutation(V)[: 2 * T].reshape(2, T).astype(np.int32)
    positions, segments = np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
    for row, lengths in enumerate(LENGTHS):
        at = 2 * row
        for number, length in enumerate(lengths):
            segments[row, at : at + length], positions[row, at : at + length] = number + 1, np.arange(length)
            at += length
    return {"tokens": tokens, "positions": positions, "segments": segments}


def documents(packed):
    """(row, slice) of each."""
    for row, segments in enumerate(packed["segments"]):
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            yield row, slice(here[0], here[-1] + 1)


@pytest.mark.parametrize("name", MODELS)
def test_each_token_is_scored_given_what_precedes_it_in_its_document(name):
    """Against the plain softmax of each document run alone; 0 for a first token and for padding."""
    config, _, params = model(name)
    packed = batch()
    scorer = score.make_score(config, ("logp", "correct"), dtype=jnp.float32)

    @jax.jit
    def run(params, packed, alone):
        hidden, _, _ = decoder.forward(config, params, alone)
        p = jax.nn.log_softmax(heads.logits(config, heads.head_of(config, params), hidden))
        return scorer("policy", params, packed), scorer("policy", params, {"tokens": alone}), p

    places = list(documents(packed))
    alone = np.stack([np.pad(packed["tokens"][row, at], (0, T - at.stop + at.start), "wrap") for row, at in places])
    got, right_padded, p = run(params, packed, alone)
    expected = {n: np.zeros((2, T), np.float32) for n in got}
    for (row, here), p_TV, own in zip(places, np.asarray(p), np.asarray(right_padded["logp"]), strict=True):
        tokens = packed["tokens"][row, here][1:]
        later, at = slice(here.start + 1, here.stop), np.arange(len(tokens))
        expected["logp"][row, later] = p_TV[at, tokens]
        expected["correct"][row, later] = p_TV[at].argmax(-1) == tokens
        np.testing.assert_allclose(own[: len(tokens) + 1], expected["logp"][row, here], rtol=0, atol=2e-5)
    for need in got:
        np.testing.assert_allclose(got[need], expected[need], rtol=0, atol=2e-5, err_msg=need)
    assert np.abs(expected["logp"]).max() > 1


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_crosses_documents(name):
    """No token occurs twice, so a row of the embedding is one place: exactly 0 for all outside the document."""
    config, _, params = model(name)
    packed = batch()
    scorer = score.make_score(config, dtype=jnp.float32)

    def reach(embedding, learnt):
        own = tree.replace(params, "embed/tokens", embedding)
        return jnp.sum(jnp.where(learnt, scorer("policy", own, packed)["logp"], 0.0))

    slope = jax.jit(jax.grad(reach))
    for row, here in documents(packed):
        learnt = np.zeros((2, T), bool)
        learnt[row, here] = True
        grad = np.abs(slope(params["embed"]["tokens"], learnt)).max(-1)
        read = packed["tokens"][row, here][:-1]  # the last token is predicted and predicts nothing
        assert (grad[read] > 0).all()
        grad[read] = 0
        assert not grad.any()


def test_noise_and_dropout_only_while_training():
    config, names, plain = model()

    class Base:
        params = plain

    Base.names = names
    params = peft.adapt(Base, jax.random.key(1), peft.LoRA(rank=2, dropout=0.5))
    params = jax.tree.map(lambda t, a: a + 0.1 if t else a, tree.trainable_mask(params), params)
    packed = batch()

    @functools.partial(jax.jit, static_argnums=0)
    def logp(alpha, params, key):
        return score.make_score(config, dtype=jnp.float32, neftune_alpha=alpha)("policy", params, packed, key)["logp"]

    def same(a, b):
        return bool(jnp.array_equal(a, b))

    assert same(logp(5.0, params, None), logp(0.0, params, None))
    dropped = [logp(0.0, params, jax.random.key(i)) for i in (0, 0, 1)]
    assert same(dropped[0], dropped[1]) and not same(dropped[0], dropped[2])
    noisy = [logp(5.0, plain, jax.random.key(i)) for i in (0, 0, 1)]
    assert same(noisy[0], noisy[1]) and not same(noisy[0], noisy[2])
    assert same(logp(0.0, plain, jax.random.key(0)), logp(0.0, plain, None))


def test_noise_falls_with_the_length_of_the_document():
    """Uniform within alpha / sqrt(length * D), whatever else is in the row."""
    packed, width = batch(), 512
    lengths = np.asarray(score.document_lengths(packed["tokens"], packed["positions"], packed["segments"]))
    for row, here in documents(packed):
        assert (lengths[row, here] == here.stop - here.start).all()
    noise = np.asarray(score.neftune(jax.random.key(0), 5.0, jnp.asarray(lengths), width))
    bound = 5.0 / np.sqrt(lengths * width)
    assert (np.abs(noise).max(-1) <= bound).all() and (np.abs(noise).max(-1) > 0.95 * bound).all()
    np.testing.assert_allclose(noise.std(-1), bound / np.sqrt(3), rtol=0.12)
    assert np.abs(noise.mean()) < 0.02 * bound.mean()
    # without segments a row is one document, as long as its positions say
    positions = np.stack([np.where(np.arange(T) < 10, np.arange(T), 0), np.arange(T)])
    lengths = score.document_lengths(packed["tokens"], positions, None)
    assert np.array_equal(lengths, np.repeat([[10], [24]], T, axis=1))
    assert np.array_equal(score.document_lengths(packed["tokens"], None, None), np.full((2, T), T))
