"""GPTQ against the paper's algorithm 1 in numpy, row by row in double precision, and against what it minimises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quant import gptq, groups
from jaxft.quant.gptq import GPTQ

ROWS, OUT = 96, 12
R = np.random.default_rng(0)
W = R.standard_normal((ROWS, OUT)) * np.exp(R.standard_normal((ROWS, 1)) * 0.3)
X = R.standard_normal((400, 24)) @ R.standard_normal((24, ROWS)) + 0.3 * R.standard_normal((400, ROWS))
X[:, 7] = 0.0  # a feature that is never used
GRAM = X.T @ X
CASES = {
    "plain": (GPTQ(), 32, True),
    "zero points": (GPTQ(), 16, False),
    "by activation": (GPTQ(act_order=True), 32, False),
    "static": (GPTQ(act_order=True, static_groups=True), 32, True),
    "column": (GPTQ(damping=0.1), -1, True),
    "column by activation": (GPTQ(act_order=True), -1, True),
    "8 bits": (GPTQ(bits=8), 32, True),
}


def range_of(w: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    if symmetric:
        scale = np.float16(np.maximum(-low, high) / {4: 7.5, 8: 127}[bits]).astype(float)
        return scale, np.full_like(scale, 2 ** (bits - 1))
    scale = np.float16((high - low) / (2**bits - 1)).astype(float)
    return scale, np.round(-low / scale)


def algorithm(w, gram, config: GPTQ, size: int, symmetric: bool) -> np.ndarray:
    """The dequantised matrix, with the explicit inverse of the paper."""
    w, h = w.copy(), gram.copy()
    dead = np.diag(h) == 0
    h[dead, dead], w[dead] = 1.0, 0.0
    size = len(w) if size == -1 else size
    order = np.argsort(-np.diag(h), kind="stable") if config.act_order else np.arange(len(w))
    fixed = [range_of(w[i : i + size], config.bits, symmetric) for i in range(0, len(w), size)]
    w, h = w[order], h[np.ix_(order, order)]
    h += config.damping * np.diag(h).mean() * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    out = np.zeros_like(w)
    for i in range(len(w)):
        if config.static_groups or size == len(w):
            scale, zero = fixed[order[i] // size]
        elif i % size == 0:
            scale, zero = range_of(w[i : i + size], config.bits, symmetric)
        out[i] = (np.clip(np.round(w[i] / scale) + zero, 0, 2**config.bits - 1) - zero) * scale
        w[i + 1 :] -= np.outer(u[i, i + 1 :], (w[i] - out[i]) / u[i, i])
    return out[np.argsort(order)]


def cost(q) -> float:
    return float(np.sum((X @ (np.asarray(q, np.float64) - W)) ** 2) / np.sum((X @ W) ** 2))


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_algorithm(name):
    config, size, symmetric = CASES[name]
    made = gptq.quantize(jnp.asarray(W, jnp.float32), jnp.asarray(GRAM, jnp.float32), config, size, symmetric)
    want = algorithm(W, GRAM, config, size, symmetric)
    # a number half way between two codes may fall to the other side in single precision, and moves what comes after it
    same = np.abs(np.asarray(made.dense()) - want) < 1e-4 * np.abs(want).max()
    assert same.mean() > 0.98 and same[: ROWS // 2].mean() > 0.98
    plain = groups.quantize(jnp.asarray(W, jnp.float32), config.bits, size, symmetric)
    assert cost(made.dense()) < 0.6 * cost(plain.dense()), "of what it minimises, less than rounding to the nearest"
    assert abs(cost(made.dense()) / cost(want) - 1) < 0.05
    assert (made.group is not None) == (name == "by activation") and (made.zero is None) == symmetric


def test_what_it_cannot_do_is_refused():
    w, gram = jnp.ones((64, 8)), jnp.eye(64)
    for call, message in (
        (lambda: gptq.quantize(w, gram.at[0, 0].set(jnp.nan), GPTQ(), 32), "inputs that are not finite"),
        (lambda: gptq.quantize(w, gram, GPTQ(), 48), "groups of 48 for 64"),
        (lambda: gptq.quantize(w.at[0].set(jnp.inf), gram, GPTQ(), 32), "not finite"),
        (lambda: GPTQ(bits=3), "quant.gptq.bits: got 3; expected 4 or 8"),
        (lambda: GPTQ(damping=0.0), "quant.gptq.damping: got 0.0"),
        (lambda: GPTQ(samples=0), "quant.gptq.samples"),
        (lambda: GPTQ(static_groups=True), "quant.gptq.static_groups"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_under_jit_and_with_uneven_rows():
    """Rows that fill no whole block where scales are found beforehand."""
    w = jnp.asarray(W[:90], jnp.float32)
    made = gptq.quantize(w, jnp.eye(90), GPTQ(), -1)
    np.testing.assert_allclose(made.dense(), groups.quantize(w, 4, -1).dense(), rtol=1e-5)
    assert jax.eval_shape(lambda: made).shape == (90, OUT)
