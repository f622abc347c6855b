"""A tap's gradients are the moments of its inputs: under scan and rematerialisation, with positions left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import tap, tree, verbs
from jaxft.core.tap import Tap
from jaxft.core.weight import Shared

L, D, B, T = 3, 6, 4, 5
MASK = np.arange(T) < np.array([5, 3, 0, 1])[:, None]


@functools.cache
def stack() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (L, D, D)) / 2


@functools.cache
def inputs() -> tuple[jax.Array, list[np.ndarray]]:
    """x [B, T, D], and what each layer of the network reads."""
    x = first = jax.random.normal(jax.random.key(1), (B, T, D))
    read = []
    for i in range(L):
        read.append(np.asarray(x, np.float64))
        x = x + jnp.tanh(x @ stack()[i])
    return first, read


def moments(remat: bool, scaled: bool) -> list[np.ndarray]:
    """(gram, total, count) as the gradients of an arbitrary function of the network's output."""

    base, (x, _) = stack(), inputs()

    def value(sums):
        w = Tap(base, *sums, mask=Shared(jnp.asarray(MASK)), scaled=scaled)
        sliced, whole = tree.hold_shared(w)

        def body(h, part):
            return h + jnp.tanh(h @ whole(part)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body) if remat else body, x, sliced)[0] ** 3)

    return [np.asarray(g) for g in jax.jit(jax.grad(value))(tap.zeros(base))]


@pytest.mark.parametrize("remat", [False, True])
def test_moments_of_every_layer(remat):
    gram, total, count = moments(remat, scaled=False)
    for i, x in enumerate(inputs()[1]):
        x = x[MASK]
        np.testing.assert_allclose(gram[i], x.T @ x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(total[i], x.sum(0), rtol=1e-5, atol=1e-5)
        assert count[i] == MASK.sum()


def test_rows_divided_by_their_largest_entry():
    gram, _, count = moments(False, scaled=True)
    for i, x in enumerate(inputs()[1]):
        rows = [row[hit] / abs(row[hit].max()) for row, hit in zip(x, MASK, strict=True) if hit.any()]
        np.testing.assert_allclose(gram[i], sum(row.T @ row for row in rows), rtol=1e-5, atol=1e-5)
        assert count[i] == 3


def test_it_is_the_base():
    w = Tap(stack(), *tap.zeros(stack()), mask=Shared(jnp.ones((B, T), bool)))
    x = inputs()[0]
    np.testing.assert_array_equal(x @ w[1], x @ stack()[1])
    np.testing.assert_array_equal(verbs.dense(w), stack())
    assert tree.strip({"w": w})["w"] is stack()
    with pytest.raises(ValueError, match=r"tap: got inputs \[2, 6\]; expected \[\*\[4, 5\]"):
        x[0, :2] @ w[0]
