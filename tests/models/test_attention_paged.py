"""Attention to a paged cache: the kernel, interpreted, and what XLA does instead, against attention to plain arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import attention_paged, cache, rope
from jaxft.models.attention_paged import Scores
from jaxft.models.cache import Cache

B, N, K, H, PAGE, M = 3, 6, 2, 16, 16, 4
LENGTHS = np.array([33, 0, 50], np.int32)
CASES = [
    ("plain", Scores(0.25)),
    ("window across a page", Scores(0.25, window=20)),
    ("window of one", Scores(0.25, window=1)),
    ("soft cap", Scores(0.5, softcap=1.5)),
]


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def given():
    """A cache of two layers whose rows have pages in disorder, and a new token for each row."""
    pages = 2 * B * M
    k, v = (drawn(seed, 2, 1, pages, K, PAGE, H) for seed in (0, 1))
    table = jax.random.permutation(jax.random.key(2), pages)[: B * M].reshape(B, M).astype(jnp.int32)
    return Cache((k,), (v,), table), drawn(3, B, 1, N, H), drawn(4, B, 1, K, H), drawn(5, B, 1, K, H)


def by_hand(cached: Cache, layer: int, q, k_new, v_new, scores: Scores) -> np.ndarray:
    """One row and head at a time, in numpy."""
    out = np.zeros((B, N, H), np.float32)
    k, v = (np.asarray(a[0][layer, 0]) for a in (cached.k, cached.v))
    for b, n in np.ndindex(B, N):
        head, length = n // (N // K), LENGTHS[b]
        if length == 0:
            continue
        places = np.arange(max(0, length - (scores.window or length)), length)
        pages = np.asarray(cached.table)[b, places // PAGE]
        keys, values = k[pages, head, places % PAGE], v[pages, head, places % PAGE]
        keys[-1], values[-1] = k_new[b, 0, head], v_new[b, 0, head]
        s = keys @ np.asarray(q[b, 0, n]) * scores.scale
        s = s if scores.softcap is None else np.tanh(s / scores.softcap) * scores.softcap
        p = np.exp(s - s.max())
        out[b, n] = p / p.sum() @ values
    return out


@pytest.mark.parametrize(("name", "scores"), CASES)
@pytest.mark.parametrize("layer", [0, 1])
def test_one_token_a_row(given, name, scores, layer):
    cached, q, k_new, v_new = given
    positions, keep = jnp.asarray(LENGTHS)[:, None] - 1, jnp.asarray(LENGTHS)[:, None] > 0
    out, after = attention_paged.attend(cached, layer, q, k_new, v_new, positions, keep, scores)
    expected = by_hand(cached, layer, q, k_new, v_new, scores)
    np.testing.assert_allclose(out[:, 0], expected, atol=1e-5)
    heads = jnp.concatenate([q[:, 0], k_new[:, 0], v_new[:, 0]], axis=1)
    pools = (cached.k[0][:, 0], cached.v[0][:, 0], jnp.int32(layer), cached.table, jnp.asarray(LENGTHS))
    for splits in (1, 3):
        said, *written = attention_paged.kernel(heads, None, *pools, scores, splits=splits, interpret=True)
        np.testing.assert_allclose(said, expected, atol=1e-5)
        for pool, held in zip(written, (after.k, after.v), strict=True):
            np.testing.assert_array_equal(pool, held[0][:, 0])


def test_rotated_on_the_way(given):
    """Queries and keys that are still to be rotated: as if they had been."""
    cached, q, k_new, v_new = given
    positions, keep = jnp.asarray(LENGTHS)[:, None] - 1, jnp.asarray(LENGTHS)[:, None] > 0
    table = rope.table(rope.Rope(H), positions)
    rotated = rope.rotate(q, *table), rope.rotate(k_new, *table)
    expected, after = attention_paged.attend(cached, 0, *rotated, v_new, positions, keep, Scores(0.25))
    got, written = attention_paged.attend(cached, 0, q, k_new, v_new, positions, keep, Scores(0.25), table=table)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    heads = jnp.concatenate([q[:, 0], k_new[:, 0], v_new[:, 0]], axis=1)
    turned = tuple(a[:, 0] for a in table)
    pools = (cached.k[0][:, 0], cached.v[0][:, 0], jnp.int32(0), cached.table, jnp.asarray(LENGTHS))
    said, k, v = attention_paged.kernel(heads, turned, *pools, Scores(0.25), splits=2, interpret=True)
    np.testing.assert_allclose(said, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(k, after.k[0][:, 0], atol=1e-6)
    np.testing.assert_array_equal(v, written.v[0][:, 0])


def test_what_is_written_is_read_in_order_and_nothing_else_changes(given):
    """Several tokens at once, some of them padding, into arrays of all layers and of one each."""
    cached, *_ = given
    k, v = drawn(6, B, 20, K, H), drawn(7, B, 20, K, H)
    positions = jnp.asarray([5, 0, 30])[:, None] + jnp.arange(20)
    keep = jnp.arange(20)[None] < jnp.asarray([20, 0, 7])[:, None]
    after = cache.write(cached, 1, positions, keep, k, v)
    before, now = (np.asarray(cache.read(c, 1)[0]).copy() for c in (cached, after))
    for b in range(B):
        for t in range(20):
            if keep[b, t]:
                before[b, positions[b, t]] = k[b, t]
    np.testing.assert_array_equal(now, before)
    np.testing.assert_array_equal(after.k[0][0], cached.k[0][0])
    apart = Cache(*(tuple(a[0][i : i + 1] for i in range(2)) for a in (cached.k, cached.v)), cached.table)
    again = cache.write(apart, 1, positions, keep, k, v)
    np.testing.assert_array_equal(again.k[1][0], after.k[0][1])
    assert again.k[0] is apart.k[0]


def test_each_shard_has_pages_of_its_own(given):
    """Two shards are two caches side by side."""
    cached, q, k_new, v_new = given
    both = Cache(
        *((jnp.concatenate([a[0], 2 * a[0]], axis=1),) for a in (cached.k, cached.v)),
        jnp.concatenate([cached.table, cached.table[::-1]]),
    )
    positions, keep = jnp.asarray(LENGTHS)[:, None] - 1, jnp.asarray(LENGTHS)[:, None] > 0
    twice = [jnp.concatenate([a, a]) for a in (q, k_new, v_new, positions, keep)]
    out, after = attention_paged.attend(both, 0, *twice, Scores(0.25))
    second = dataclasses.replace(cached, k=(2 * cached.k[0],), v=(2 * cached.v[0],), table=cached.table[::-1])
    for s, own in enumerate((cached, second)):
        said, kept = attention_paged.attend(own, 0, q, k_new, v_new, positions, keep, Scores(0.25))
        np.testing.assert_allclose(out[s * B : (s + 1) * B], said, atol=1e-6)
        np.testing.assert_array_equal(after.k[0][:, s], kept.k[0][:, 0])


def test_copied_pages(given):
    """A page beyond the last is copied nowhere."""
    cached, *_ = given
    pages = cached.k[0].shape[2]
    after = cache.copy_pages(cached, jnp.array([[0, 3]]), jnp.array([[5, pages]]))
    expected = np.asarray(cached.k[0]).copy()
    expected[:, :, 5] = expected[:, :, 0]
    np.testing.assert_array_equal(after.k[0], expected)
