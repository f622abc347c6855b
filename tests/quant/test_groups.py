"""Integers in groups against the formula in numpy: every layout, every verb, and what rounding to nearest makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import quant
from jaxft.core import tree
from jaxft.quant import IntGroups, QuantConfig, groups, pack
from jaxft.sharding import mesh as meshes
from jaxft.sharding import rules
from jaxft.sharding.mesh import MeshConfig
from tests.peft import pairs

R = np.random.default_rng(0)
ROWS, OUT = 192, 24
ORDERS = {
    "in order": None,
    "shuffled": R.permutation(np.repeat(np.arange(6), 32)),
    "unequal": np.sort(R.integers(0, 6, ROWS))[R.permutation(ROWS)],
}
ZEROS = {
    "symmetric": None,
    "whole": R.integers(0, 16, (2, 6, OUT)).astype(np.uint8),
    "fractional": R.uniform(0, 15, (2, 6, OUT)).astype(np.float16),
}
CASES = [
    (4, "symmetric", "in order"), (4, "whole", "in order"), (4, "whole", "shuffled"), (4, "fractional", "unequal"),
    (8, "symmetric", "in order"), (8, "fractional", "shuffled"),
]  # fmt: skip
cases = pytest.mark.parametrize(("bits", "zero", "order"), CASES)


def made(bits: int, zero: str, order: str) -> tuple[IntGroups, np.ndarray]:
    """Two layers of random codes in six groups, and the matrices they stand for."""
    codes = R.integers(0, 2**bits, (2, ROWS, OUT)).astype(np.uint8)
    scale = (R.uniform(1e-3, 1e-2, (2, 6, OUT)) * 2.0 ** (4 - bits)).astype(np.float16)
    of = np.arange(ROWS) // 32 if ORDERS[order] is None else ORDERS[order]
    middle = np.full((2, 6, OUT), 2 ** (bits - 1)) if ZEROS[zero] is None else ZEROS[zero]
    right = (codes - middle[:, of].astype(np.float64)) * scale[:, of]
    group = None if ORDERS[order] is None else np.stack([of, of]).astype(np.int32)
    return groups.stored(codes, scale, ZEROS[zero], group, bits, "float32"), right.astype(np.float32)


@cases
def test_it_stands_for_its_formula_and_behaves_like_an_array(bits, zero, order):
    q, right = made(bits, zero, order)
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # noqa: E731
    close(q.dense(), right)
    assert (q.shape, q.ndim, q.dtype, q[1].shape) == ((2, ROWS, OUT), 3, f"int{bits}", (ROWS, OUT))
    assert q.codes.size * 8 == right.size * bits and tree.count({"w": q}) == right.size
    x = R.standard_normal((3, 5, ROWS)).astype(np.float32)
    close(x @ q[1], x @ right[1])
    close(jax.grad(lambda x: jnp.sum(x @ q[1]))(x), np.broadcast_to(right[1].sum(1), x.shape))
    ids = jnp.asarray([[0, 31, 32], [63, 64, 191]])
    np.testing.assert_array_equal(q[1].take(ids), q[1].dense()[ids])
    close(q[1].unembed(x[..., :OUT]), x[..., :OUT] @ right[1].T)
    sizes = jnp.asarray([2, 3])
    close(q.ragged_dot(x[0], sizes), np.concatenate([x[0, :2] @ right[0], x[0, 2:] @ right[1]]))
    assert q.astype(jnp.bfloat16).dtype == jnp.bfloat16 and f"int{bits}[2,192,24]" in repr(q)
    assert ("any order" in repr(q)) == (order != "in order") and ("symmetric" in repr(q)) == (zero == "symmetric")


@pytest.mark.parametrize("order", ORDERS)
def test_sharded_over_both_axes(order):
    q, right = made(4, "whole", order)
    mesh = meshes.create(MeshConfig(1, 2, 2), jax.devices()[:4])
    placed = jax.device_put(q, rules.of("layers/attn/q", q, mesh))
    assert placed.codes.addressable_shards[0].data.shape == (2, ROWS // 4, OUT // 2)
    x = R.standard_normal((4, ROWS)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(lambda x, w: x @ w)(x, placed[0]), x @ right[0], rtol=1e-4, atol=1e-4)


def rounded(w: np.ndarray, bits: int, size: int, symmetric: bool) -> np.ndarray:
    """The formula, column by column and group by group: scales in float16, zero always within the range."""
    out = np.empty_like(w, np.float64)
    for at in np.ndindex(w.shape[0], w.shape[1] // size, w.shape[2]):
        rows = (at[0], slice(at[1] * size, (at[1] + 1) * size), at[2])
        x, least = w[rows].astype(np.float64), np.float16(6e-8)  # what a scale cannot be smaller than
        low, high, most = min(x.min(), 0), max(x.max(), 0), 2**bits - 1
        if symmetric:
            scale, zero = max(np.float16(np.float32(max(-low, high)) / {4: 7.5, 8: 127}[bits]), least), 2 ** (bits - 1)
        else:
            scale = max(np.float16(np.float32(high - low) / most), least)
            zero = np.clip(np.round(-low / np.float64(scale)), 0, most)
        scale = np.float64(scale)
        out[rows] = (np.clip(np.round(x / scale) + zero, 0, most) - zero) * scale
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (4, -1), (8, 64)])
def test_rounding_to_nearest(bits, size, symmetric):
    w = R.standard_normal((2, 128, 6)).astype(np.float32)
    w[0, :64, 1], w[1, :, 2], w[1, :, 3] = 0.0, np.abs(w[1, :, 2]) + 1, 1e-7 * w[1, :, 3]
    q = quant.groups.quantize(w, bits, size, symmetric)
    want = rounded(w, bits, 128 if size == -1 else size, symmetric)
    # the definition in double precision may round a number half way between two codes the other way
    step = np.repeat(np.asarray(q.scale, np.float32), 128 // q.scale.shape[-2], axis=1)
    off = np.abs(np.asarray(q.dense()) - want)
    assert (off > 1e-5 * step).mean() < 2e-3 and (off <= 1.001 * step).all()
    assert (q.zero is None) == symmetric


def test_error_and_size():
    """Of normal weights in groups of 64; NF4's is .0085."""
    w = jax.random.normal(jax.random.key(0), (1024, 512)) * 0.02
    for kind, bits, want in (("int4", 4.25, 0.0105), ("int8_blockwise", 8.25, 3.7e-5)):
        made = QuantConfig(kind).pack(w)
        assert abs(float(jnp.mean((made.dense() - w) ** 2) / jnp.mean(w**2)) / want - 1) < 0.05
        assert 8 * made.nbytes / w.size == bits
    whole = QuantConfig("int4", symmetric=False, block_size=-1).pack(w)
    assert whole.scale.shape == whole.zero.shape == (1, 512) and whole.zero.dtype == jnp.uint8


def test_a_model_in_groups_computes_as_its_dense_one():
    model = pairs.model("llama")
    params = pack(model.params, model.names, QuantConfig("int4", block_size=16))
    assert isinstance(params["layers"]["mlp"]["down"], IntGroups)
    exact = jax.tree.map(lambda w: w.dense() if isinstance(w, IntGroups) else w, params, is_leaf=tree.is_weight)
    np.testing.assert_allclose(pairs.logits("llama", params), pairs.logits("llama", exact), atol=1e-4)
    assert np.abs(pairs.logits("llama", params) - pairs.logits("llama", model.params)).max() > 1e-2


BAD = {
    "size": (lambda w: groups.quantize(w, 4, 48), "groups of 48 for 128 input features; expected a divisor"),
    "none": (lambda w: groups.quantize(w, 4, 0), "groups of 0"),
    "odd": (lambda w: groups.quantize(w[:33], 4, 3), "got 33 input features; expected an even number"),
    "bits": (lambda w: groups.quantize(w, 3), "got kind 'int3'; expected one of int4, int8"),
    "large": (lambda w: groups.quantize(w.at[3, 3].set(1e6)), "beyond 65504"),
    "nan": (lambda w: groups.quantize(w.at[3, 3].set(jnp.nan)), "not finite"),
    "integers": (lambda w: groups.quantize(w.astype(int)), "expected a floating array"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((128, 16)))
