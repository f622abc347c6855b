"""Attention over a prefix, computed apart and merged, against the formula with the prefix's keys among the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import attention_xla
from jaxft.models.attention import attention
from tests.models.test_attention import SCALE, distance, naive, packed, tensors, with_grads


def joined(q, k, v, kp, vp, positions, segments, **options):
    """The formula; the prefix's keys at 0..P-1 are of the segment of whoever asks, which one call a segment gives."""
    B, P = q.shape[0], kp.shape[0]
    k, v = (jnp.concatenate([jnp.broadcast_to(x, (B, *x.shape)), y], 1) for x, y in ((kp, k), (vp, v)))
    own = np.ones(positions.shape, np.int32) if segments is None else segments
    at = jnp.concatenate([jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P)), positions], 1)
    out = 0.0
    for number in range(1, 5):  # `packed` makes four documents
        mine = jnp.concatenate([jnp.full((B, P), number, jnp.int32), own], 1)
        one = naive(q, k, v, positions, at, own, mine, **options)
        out = out + jnp.where((own == number)[:, :, None, None], one, 0.0)
    return out


@pytest.mark.parametrize(
    ("heads", "window", "softcap", "segmented"),
    [((4, 2), None, None, False), ((4, 1), 6, 3.0, True), ((4, 4), 9, None, False), ((4, 2), None, 3.0, True)],
)
def test_equals_the_formula_with_the_prefix_in_front(heads, window, softcap, segmented):
    """Output and gradients of queries, keys, values and the prefix; some queries are too far on to see all of it."""
    B, T, P, H = 2, 23, 5, 6
    q, k, v, g = tensors(0, B, T, T, *heads, H)
    kp, vp = (x[0] for x in tensors(1, 1, P, P, *heads, H)[1:3])
    segments, positions = packed(2, B, T)
    if not segmented:
        segments, positions = None, jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    positions = positions + P
    options = {"window": window, "softcap": softcap}

    def ours(q, k, v, kp, vp):
        return attention(
            q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments,
            k_segments_BS=segments, scale=SCALE, prefix=(kp, vp), **options,
        )  # fmt: skip

    got = with_grads(ours, g, q, k, v, kp, vp)
    expected = with_grads(lambda *x: joined(*x, positions, segments, **options), g, q, k, v, kp, vp)
    assert all(distance(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))


def test_the_log_sum_exp_has_its_gradient():
    """In several blocks: d lse / d q and / d k against autodiff of the formula."""
    q, k, v, _ = tensors(3, 2, 40, 40, 4, 2, 8)
    g = jnp.asarray(np.random.default_rng(4).normal(size=(2, 40, 4)), jnp.float32)
    spec = attention_xla.Spec(SCALE, block=16)

    def exact(q, k, v):
        s = jnp.einsum("btnh,bsnh->btns", q, jnp.repeat(k, 2, 2)) * SCALE
        keep = jnp.tril(jnp.ones((40, 40), bool))[None, :, None]
        return jax.nn.logsumexp(jnp.where(keep, s, -jnp.inf), axis=-1)

    ours = with_grads(lambda *x: attention_xla.part(spec, *x, attention_xla.Ids())[1], g, q, k, v)
    theirs = with_grads(exact, g, q, k, v)
    assert all(distance(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))
