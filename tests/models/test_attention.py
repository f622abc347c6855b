"""The XLA attention path against the textbook formula, and the properties every backend owes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import attention_xla
from jaxft.models.attention import attention

SCALE = 0.3


def naive(q, k, v, q_pos, k_pos, q_seg, k_seg, *, window=None, softcap=None, causal=True, scale=SCALE):
    """The formula with every score at once; works on numpy float64 and, differentiably, on jax float32."""
    np_ = jnp if isinstance(q, jax.Array) else np
    k, v = (np_.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = np_.einsum("btnh,bsnh->bnts", q, k) * scale
    if softcap is not None:
        s = np_.tanh(s / softcap) * softcap
    distance = (q_pos[:, :, None] - k_pos[:, None, :])[:, None]
    keep = np_.ones(distance.shape, bool)
    if causal:
        keep = keep & (distance >= 0)
    if window is not None:
        keep = keep & (distance < window)
    if q_seg is not None:
        keep = keep & ((q_seg[:, :, None] == k_seg[:, None, :]) & (q_seg[:, :, None] != 0))[:, None]
    p = np_.where(keep, np_.exp(np_.where(keep, s - s.max(-1, keepdims=True), 0.0)), 0.0)
    total = p.sum(-1, keepdims=True)
    return np_.einsum("bnts,bsnh->btnh", p / np_.where(total == 0, 1.0, total), v)


def tensors(seed, B, T, S, N, K, H, dtype=jnp.float32):
    """q, k, v and an output cotangent, standard normal."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def packed(seed, B, T):
    """Segments of one to a few documents a row with padding on the right, and positions that restart."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        cuts = np.sort(rng.choice(np.arange(1, T), size=4, replace=False))
        for n, (a, b) in enumerate(itertools.pairwise([0, *cuts]), 1):
            segments[row, a:b], positions[row, a:b] = n, np.arange(b - a)
    return jnp.asarray(segments), jnp.asarray(positions)


def self_attention(q, k, v, positions=None, segments=None, block=attention_xla.BLOCK, **options):
    """`attention` by XLA on the queries' own tokens, with a smaller block than the default where asked."""
    if block == attention_xla.BLOCK:
        return attention(
            q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments,
            k_segments_BS=segments, scale=SCALE, backend="xla", **options,
        )  # fmt: skip
    spec = attention_xla.Spec(SCALE, aligned=True, block=block, **options)
    return attention_xla.attend(spec, q, k, v, attention_xla.Ids(None, None, segments, segments))


def distance(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def with_grads(f, g, *x):
    """f(*x) and its gradients against g, compiled once."""

    @jax.jit
    def run(g, *x):
        out, back = jax.vjp(f, *x)
        return out, *back(g)

    return run(g, *x)


CASES = [
    (block, *case)
    for block in (16, 512)
    for case in (
        # heads, window, softcap, segments, causal
        ((4, 4), None, None, False, True),
        ((4, 2), None, None, True, True),
        ((4, 1), 6, None, False, True),
        ((4, 2), 6, 3.0, True, True),
        ((4, 4), None, 3.0, False, True),
        ((4, 1), None, 3.0, True, False),
        ((4, 2), 6, None, False, False),
        ((4, 4), None, None, False, False),
    )
]


@pytest.mark.parametrize(("block", "heads", "window", "softcap", "segments", "causal"), CASES)
def test_equals_the_formula(block, heads, window, softcap, segments, causal):
    """Output within 1e-6 of float64, gradients within 1e-5 of naive autodiff; T is no multiple of the block, H odd."""
    B, T, H = 2, 41, 5
    q, k, v, g = tensors(0, B, T, T, *heads, H)
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    seg = packed(1, B, T)[0] if segments else None
    options = {"window": window, "softcap": softcap, "causal": causal}

    ours = with_grads(lambda *x: self_attention(*x, segments=seg, block=block, **options), g, q, k, v)
    exact = naive(*(np.asarray(x, np.float64) for x in (q, k, v)), *map(_numpy, (index, index, seg, seg)), **options)
    assert distance(ours[0], exact) < 1e-6 * max(1.0, float(np.abs(exact).max()))
    theirs = with_grads(lambda *x: naive(*x, index, index, seg, seg, **options), g, q, k, v)
    assert all(distance(a, b) < 1e-5 for a, b in zip(ours[1:], theirs[1:], strict=True))


def _numpy(x):
    return None if x is None else np.asarray(x)


@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize(("window", "block"), [(None, 512), (5, 16)])
def test_decoding_against_a_cache_equals_the_formula(T, window, block):
    """T new tokens against S slots: some empty, some of padding on the left, some not yet written."""
    B, S, N, K, H = 3, 53, 4, 2, 8
    q, k, v, g = tensors(2, B, T, S, N, K, H)
    pad = jnp.asarray([0, 4, 1], jnp.int32)[:, None]
    slot = jnp.arange(S, dtype=jnp.int32)[None]
    start = S - 6 - T
    k_seg = ((slot >= pad) & (slot < start + T)).astype(jnp.int32)
    k_pos = jnp.where(k_seg == 1, slot - pad, 0)
    q_pos, q_seg = k_pos[:, start : start + T], k_seg[:, start : start + T]
    spec = attention_xla.Spec(SCALE, window=window, aligned=False, block=block)

    ids = attention_xla.Ids(q_pos, k_pos, q_seg, k_seg)
    ours = with_grads(lambda *x: attention_xla.attend(spec, *x, ids), g, q, k, v)
    theirs = with_grads(lambda *x: naive(*x, q_pos, k_pos, q_seg, k_seg, window=window), g, q, k, v)
    assert distance(ours[0], theirs[0]) < 2e-6
    assert all(distance(a, b) < 1e-5 for a, b in zip(ours[1:], theirs[1:], strict=True))
    public = attention(
        q, k, v, q_positions_BT=q_pos, k_positions_BS=k_pos, q_segments_BT=q_seg, k_segments_BS=k_seg,
        scale=SCALE, window=window,
    )  # fmt: skip
    assert distance(public, ours[0]) < 2e-6


def test_padding_on_either_side_changes_nothing():
    """A document alone, padded on the left, and padded on the right: the same outputs on its tokens."""
    T, pad = 9, 4
    q, k, v, _ = tensors(3, 1, T, T, 4, 2, 8)
    alone = jax.jit(self_attention)(q, k, v)
    for before, after in ((pad, 0), (0, pad)):
        wide = [(0, 0), (before, after), (0, 0), (0, 0)]
        segments = jnp.pad(jnp.ones((1, T), jnp.int32), wide[:2])
        filled = [jnp.pad(x, wide, constant_values=7.0) for x in (q, k, v)]
        out = jax.jit(self_attention)(*filled, segments=segments)
        assert distance(out[:, before : before + T], alone) < 1e-6
        assert not np.asarray(out[:, :before]).any() and not np.asarray(out[:, before + T :]).any()


def test_causality_by_gradient():
    """Output t depends on key s exactly where s <= t, whatever the block."""
    T = 40
    q, k, v, _ = tensors(4, 1, T, T, 2, 1, 4)
    for block in (512, 16):
        jacobian = jax.jit(jax.jacrev(lambda v, b=block: self_attention(q, k, v, block=b).sum((0, 2, 3))))(v)
        assert (np.abs(np.asarray(jacobian)).sum((1, 3, 4)) != 0).tolist() == np.tri(T, dtype=bool).tolist()


@pytest.mark.parametrize("block", [512, 16])
def test_no_gradient_crosses_segments(block):
    """What one document's outputs are worth gives no gradient to another's queries, keys and values, nor to padding."""
    B, T = 2, 40
    q, k, v, g = tensors(5, B, T, T, 4, 2, 8)
    segments, _ = packed(6, B, T)
    back = jax.jit(jax.vjp(lambda *x: self_attention(*x, segments=segments, block=block), q, k, v)[1])
    for segment in (1, 2, 3):
        mine = np.asarray(segments == segment)
        for grad in back(jnp.where(jnp.asarray(mine)[:, :, None, None], g, 0.0)):
            assert np.asarray(grad)[mine].any() and not np.asarray(grad)[~mine].any()


@pytest.mark.parametrize("window", [None, 5])
def test_packed_equals_separate_documents(window):
    length, T = 13, 40
    q, k, v, _ = tensors(7, 1, T, T, 4, 2, 8)
    index = np.arange(T)
    segments = jnp.asarray(np.where(index < 3 * length, 1 + index // length, 0)[None], jnp.int32)
    run = jax.jit(lambda *x, **options: self_attention(*x, window=window, **options))
    out = run(q, k, v, positions=jnp.asarray(index % length, jnp.int32)[None], segments=segments)
    for a in range(0, 3 * length, length):
        assert distance(out[:, a : a + length], run(*(x[:, a : a + length] for x in (q, k, v)))) < 1e-6


def test_rows_that_see_nothing_are_zero_and_give_no_nan():
    q, k, v, g = tensors(9, 2, 40, 40, 4, 2, 8)
    for block in (512, 16):
        for segments in (jnp.zeros((2, 40), jnp.int32), jnp.ones((2, 40), jnp.int32).at[:, 16:].set(0)):
            out, *grads = with_grads(
                lambda *x, s=segments, b=block: self_attention(*x, segments=s, block=b), g, q, k, v
            )
            assert not np.asarray(out)[np.asarray(segments) == 0].any()
            for grad in grads:
                assert np.isfinite(np.asarray(grad)).all() and not np.asarray(grad)[np.asarray(segments) == 0].any()


def test_huge_scores_do_not_overflow():
    q, k, v, g = (100.0 * x for x in tensors(10, 1, 40, 40, 2, 2, 8))
    assert all(
        np.isfinite(np.asarray(x)).all() for x in with_grads(lambda *x: self_attention(*x, block=16), g, q, k, v)
    )


def test_a_window_wider_than_the_row_is_no_window():
    q, k, v, _ = tensors(11, 1, 12, 12, 2, 2, 4)
    program = [str(jax.make_jaxpr(lambda *x, w=w: self_attention(*x, window=w))(q, k, v)) for w in (12, None, 11)]
    assert program[0] == program[1] != program[2]


def test_bfloat16_is_within_its_rounding_of_float32():
    """Inputs exact in bfloat16: output and gradients within 4 roundings (2^-8 each) of the float32 truth's scale."""
    q, k, v, g = tensors(12, 2, 96, 96, 4, 2, 32, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    segments, _ = packed(13, 2, 96)
    for block in (512, 32):
        outs = with_grads(lambda *x, b=block: self_attention(*x, segments=segments, block=b), g, q, k, v)
        truth = with_grads(lambda *x: self_attention(*x, segments=segments), wide[3], *wide[:3])
        assert {x.dtype for x in outs} == {jnp.dtype(jnp.bfloat16)}
        for ours, exact in zip(outs, truth, strict=True):
            assert distance(ours, exact) < 4 * 2**-8 * float(jnp.abs(exact).max())


def test_memory_is_of_blocks_not_of_scores():
    """T = 4096: forward and backward hold less than half of one [B, N, T, T] float32 array."""
    B, T, N, H = 1, 4096, 4, 16
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    s = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def step(q, k, v, g, segments):
        return jax.vjp(lambda *x: self_attention(*x, segments=segments), q, k, v)[1](g)

    memory = jax.jit(step).lower(x, x, x, x, s).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * 4 * B * N * T * T


@pytest.mark.parametrize(("window", "pairs"), [(None, 36), (100, 15), (600, 21)])
def test_hidden_blocks_are_not_visited(window, pairs):
    """T = 4096 is eight blocks: the lower triangle has 36 pairs, a window leaves the blocks its band touches."""
    grid = attention_xla._grid(attention_xla.Spec(1.0, window=window), 4096, 4096)
    assert len(grid.pairs) == pairs


def test_a_checkpoint_policy_can_keep_the_residuals():
    """With the name kept, the rematerialised backward pass computes no softmax forward again."""
    q, k, v, g = tensors(14, 1, 32, 32, 2, 2, 8)

    def exponentials(policy):
        f = jax.checkpoint(lambda *x: self_attention(*x), policy=policy)
        back = jax.vjp(f, q, k, v)[1]
        return str(jax.make_jaxpr(back)(g)).count("= exp")

    policies = jax.checkpoint_policies
    kept = exponentials(policies.save_only_these_names(attention_xla.RESIDUALS))
    assert kept == 1 and exponentials(policies.nothing_saveable) > kept


def test_vmap_over_adapters_equals_a_loop():
    stacked = [jnp.stack(x) for x in zip(*(tensors(s, 2, 20, 20, 4, 2, 8) for s in (15, 16)), strict=True)]
    segments, _ = packed(17, 2, 20)
    one = jax.jit(lambda q, k, v: self_attention(q, k, v, segments=segments))
    both = jax.jit(jax.vmap(one))(*stacked[:3])
    for n in range(2):
        assert distance(both[n], one(*(x[n] for x in stacked[:3]))) < 1e-6


ONES = jnp.ones((1, 4), jnp.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_segments_BT": ONES}, "segments for one of queries and keys"),
        ({"q_positions_BT": ONES}, "positions for one of queries and keys"),
        ({"q_segments_BT": ONES, "k_segments_BS": jnp.ones((1, 4), jnp.int32)}, "one segments array"),
        ({"window": 0}, "window=0"),
        ({"k_BSKH": jnp.ones((1, 5, 2, 8))}, "expected"),
        ({"q_BTNH": jnp.ones((1, 4, 3, 8))}, "N a multiple of K"),
        ({"q_BTNH": jnp.ones((1, 4, 4, 8), jnp.bfloat16)}, "one dtype"),
    ],
)
def test_misuse_is_named(change, message):
    x = jnp.ones((1, 4, 2, 8))
    call = {
        "q_BTNH": jnp.ones((1, 4, 4, 8)), "k_BSKH": x, "v_BSKH": x, "q_positions_BT": None, "k_positions_BS": None,
        "q_segments_BT": None, "k_segments_BS": None, "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        attention(**(call | change))
