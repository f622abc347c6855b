"""Eight bits: the error of products and their gradients, under scan and vmap, and what is multiplied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import peft
from jaxft.core import tree
from jaxft.models import decoder, heads
from jaxft.quant import EightBit, QuantConfig, eight_bit, four_bit, pack
from jaxft.testing import jaxprs
from tests.peft import pairs

kinds = pytest.mark.parametrize("kind", ["int8", "fp8"])
ERROR = {"int8": 0.0105, "fp8": 0.038}
"""Relative error of a product of normal data, of the inputs' and the weights' rounding together."""


def off(got, want) -> float:
    return float(jnp.linalg.norm((got - want).astype(jnp.float32)) / jnp.linalg.norm(want.astype(jnp.float32)))


@kinds
def test_products_and_input_gradients(kind):
    w = jax.random.normal(jax.random.key(0), (512, 384))
    x = jax.random.normal(jax.random.key(1), (4, 32, 512))
    q = eight_bit.quantize(w, kind)
    assert q.dtype == kind and q.shape == w.shape and q.nbytes < 1.01 * w.size and tree.count(q) == w.size
    assert 0.5 * ERROR[kind] < off(x @ q, x @ w) < ERROR[kind]
    g = jax.random.normal(jax.random.key(2), (4, 32, 384))
    (got,), (want,) = (jax.vjp(lambda x, w=w: x @ w, x)[1](g) for w in (q, w))
    assert off(got, want) < 1.1 * ERROR[kind]
    assert (x.astype(jnp.bfloat16) @ q).dtype == jnp.bfloat16
    assert off(q.dense(), w) < 0.8 * ERROR[kind]
    exact = eight_bit.quantize(w, kind, exact=True)
    np.testing.assert_allclose(x @ exact, x @ q.dense(), rtol=1e-4, atol=1e-4)


@kinds
def test_both_directions_multiply_codes(kind):
    """Every product of the program is in eight bits, and no dense matrix is kept."""
    q = eight_bit.quantize(jax.random.normal(jax.random.key(0), (3, 64, 64)), kind)

    def network(x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, q)[0])

    x = jnp.ones((5, 64))
    products = [e for e in jaxprs.equations(jax.make_jaxpr(jax.grad(network))(x)) if e.primitive.name == "dot_general"]
    assert len(products) == 2
    assert all(v.aval.dtype == eight_bit.CODES[kind] for e in products for v in e.invars)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(network, x)[1], x))
    assert not [a for a in kept if a.shape[-2:] == (64, 64) and a.dtype != eight_bit.CODES[kind]]


@kinds
def test_rows_and_zeros(kind):
    """Each row of x has its own scale; zeros stay zeros; many adapters are a vmap over x with the base as it is."""
    w = jax.random.normal(jax.random.key(0), (32, 16)).at[:, 3].set(0.0)
    q = eight_bit.quantize(w, kind)
    x = jax.random.normal(jax.random.key(1), (4, 32)) * 10.0 ** jnp.arange(-3.0, 1.0)[:, None]
    alone = jnp.stack([row @ q for row in x])
    np.testing.assert_allclose(x @ q, alone, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda row: row @ q)(x), alone, rtol=1e-5)
    assert not np.any(alone[:, 3]) and not np.any(jnp.zeros((2, 32)) @ q)


@kinds
def test_lora_trains_on_it(kind):
    """Its gradients are those on the plain base to a few times the error of one product."""
    loaded = pairs.ours("llama_tied")
    grads = []
    for params in (pack(loaded.params, loaded.names, QuantConfig(kind)), loaded.params):
        model = pairs.model("llama_tied")
        model.params = params
        adapted = peft.adapt(model, jax.random.key(0), peft.LoRA(rank=4, init="random"))
        trainable, frozen = tree.partition(adapted, jaxft.trainable_mask(adapted))

        def loss(trainable, frozen=frozen):
            params = tree.combine(trainable, frozen)
            hidden, _, _ = decoder.forward(loaded.config, params, jnp.asarray(pairs.TOKENS), None, None)
            return jnp.mean(heads.logits(loaded.config, heads.head_of(loaded.config, params), hidden) ** 2)

        grads.append(jnp.concatenate([g.reshape(-1) for g in jax.tree.leaves(jax.grad(loss)(trainable))]))
    assert isinstance(params["layers"]["attn"]["q"], jax.Array)
    assert off(*grads) < 6 * ERROR[kind]


@kinds
@pytest.mark.parametrize("stored", ["eight", "four"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activations_of_every_size(kind, stored, dtype):
    """The largest sums in float16; rows of almost nothing; numbers that are not finite are not hidden."""
    w = jnp.abs(jax.random.normal(jax.random.key(0), (512, 64)))
    q = eight_bit.quantize(w, kind) if stored == "eight" else four_bit.quantize(w, compute=kind)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (4, 512))).astype(dtype).at[:, 5].set(0.0)
    got, back = jax.vjp(lambda x: x @ q, x)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert got.dtype == dtype and off(got.astype(jnp.float32), jnp.asarray(want)) < 0.05
    (g,) = back(got / 100)
    assert off(g.astype(jnp.float32), jnp.asarray(want / 100 @ np.asarray(w, np.float64).T)) < 0.1
    small = x.at[1].multiply(1e-37 if dtype == "float32" else 1e-7)
    assert bool(jnp.all(jnp.isfinite(small @ q))) and bool(jnp.all((small @ q)[0] == got[0]))
    for bad in (jnp.nan, jnp.inf):
        broken = x.at[2, 3].set(bad) @ q
        assert not bool(jnp.any(jnp.isfinite(broken[2]))) and bool(jnp.all(broken[0] == got[0]))


def test_bad_input_is_refused():
    for w, kind, message in (
        (jnp.ones(4), "int8", "expected a floating array"),
        (jnp.ones((4, 4)), "int9", "got kind 'int9'; expected one of int8, fp8"),
        (jnp.full((4, 4), jnp.nan), "fp8", "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            eight_bit.quantize(w, kind)
    assert "int8[4,4]" in repr(eight_bit.quantize(jnp.ones((4, 4)))) and isinstance(
        eight_bit.quantize(jnp.ones((4, 4))), EightBit
    )


@kinds
def test_outlier_channels_that_weights_tell_of_cost_nothing(kind):
    """Channels of x 64 times the others', with weights as much smaller: rounded as if there were none."""
    w = jax.random.uniform(jax.random.key(0), (2, 256, 128), minval=-1.0).at[..., 0].set(1.0).astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (64, 256)).astype(jnp.bfloat16)
    out = jnp.ones(256).at[jnp.array([3, 70, 200])].set(64.0).astype(jnp.bfloat16)
    planted, plain = w / out[:, None], eight_bit.quantize(w, kind)
    even = eight_bit.quantize(planted, kind, equalise=True)
    np.testing.assert_array_equal(even.rows, jnp.broadcast_to(1 / out.astype(jnp.float32), (2, 256)))
    assert even.shape == w.shape and even.axes(("layer", "in", "out"))["rows"] == ("layer", "in")
    exact = eight_bit.quantize(planted, kind, exact=True, equalise=True)[1]
    for i in range(2):
        np.testing.assert_array_equal((x * out) @ even[i], x @ plain[i])
        np.testing.assert_array_equal(even[i].dense(), (plain[i].dense() / out[:, None]).astype(jnp.bfloat16))
        np.testing.assert_array_equal(even[i].take(jnp.array([70, 4])), even[i].dense()[jnp.array([70, 4])])
    np.testing.assert_array_equal(x @ exact, x @ even[1].dense())
    grad = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w).astype(jnp.float32)))
    np.testing.assert_array_equal(grad(x * out, even[0]), grad(x, plain[0]) / out)
    if kind == "int8":
        assert off((x * out) @ eight_bit.quantize(planted, kind)[0], x @ w[0]) > 5 * ERROR[kind]
    usual = eight_bit.quantize(w.at[0, 5].multiply(16.0), kind, equalise=True)  # never makes a feature of x larger
    np.testing.assert_array_equal(usual.rows, 1.0)
    assert bool(jnp.all(eight_bit.quantize(w.at[:, 7].set(0.0), kind, equalise=True).rows[:, 7] == 1.0))


@kinds
@pytest.mark.parametrize("stored", ["nf4", "fp4"])
def test_four_bits_multiplied_in_eight(kind, stored):
    """As the dense matrix in eight bits, in both directions, and with an adapter's product added."""
    w = 0.02 * jax.random.normal(jax.random.key(0), (512, 384))
    four = four_bit.quantize(w, stored)
    eight = four_bit.quantize(w, stored, compute=kind)
    x, g = (jax.random.normal(jax.random.key(i), (4, 32, n)) for i, n in ((1, 512), (2, 384)))
    most = 1.05 * ERROR[kind]  # a few percent more than of normal weights: fp4 has more numbers near the largest
    assert 0.4 * most < off(x @ eight, x @ four) < most
    u, v = jax.random.normal(jax.random.key(3), (4, 32, 8)), jax.random.normal(jax.random.key(4), (8, 384))
    (y, got), (z, want) = (jax.vjp(lambda x, u, v, w=w: w.plus(x, u, v), x, u, v) for w in (eight, four))
    assert off(y, z) < most
    for i, (a, b) in enumerate(zip(got(g), want(g), strict=True)):
        assert off(a, b) < (1.1 * most if i == 0 else 1e-6)
    np.testing.assert_array_equal(eight.dense(), four.dense())
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), eight)
    assert off(jax.lax.scan(lambda c, w: (c, x @ w), 0, stack)[1][1], x @ eight) < 0.2 * most  # halves go either way
    assert repr(eight) != repr(four)


def test_what_is_computed_in_eight_bits_is_said():
    with pytest.raises(ValueError, match=r"quant.compute: got fp8 with quant.method=int8; expected nf4 or fp4"):
        QuantConfig("int8", compute="fp8")
    with pytest.raises(ValueError, match=r"quant.compute: got 'fp4'; expected one of exact, int8, fp8"):
        QuantConfig("nf4", compute="fp4")  # type: ignore[arg-type]
