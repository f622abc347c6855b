"""The readings of a jaxpr that the conformance tests rest on: each catches the fault it is there to catch."""

import jax
import jax.numpy as jnp

from jaxft.testing import jaxprs

IN, OUT, R = 10, 14, 3


def dense_update(a, x, b, base):
    """What an adapter must not do: build W + AB."""
    return jnp.sum(jnp.sin(x @ (base + a @ b)))


def low_rank(a, x, b, base):
    return jnp.sum(jnp.sin(x @ base + (x @ a) @ b))


def dequantised(a, x, b, codes):
    """What a quantised base must not do: keep the matrix it unpacked."""
    base = codes.astype(jnp.float32) * jnp.float32(0.1)
    return jnp.sum(jnp.sin(x @ base + (x @ a) @ b))


def arguments(dtype=jnp.float32):
    a, b = jnp.ones((IN, R)), jnp.ones((R, OUT))
    return a, jnp.ones((5, IN)), b, jnp.ones((IN, OUT), dtype)


def test_a_dense_gradient_is_found():
    """Two products of the weight's shape in the forward pass and the backward pass; none in a low-rank one."""
    bad = jax.make_jaxpr(jax.grad(dense_update))(*arguments())
    good = jax.make_jaxpr(jax.grad(low_rank))(*arguments())
    assert len(jaxprs.matrix_products(bad, (IN, OUT))) == 2
    assert jaxprs.matrix_products(good, (IN, OUT)) == []


def test_it_is_found_inside_scan_and_remat():
    def loss(a, x, b, bases):
        step = jax.checkpoint(lambda h, base: (h + dense_update(a, x, b, base), None))
        return jax.lax.scan(step, jnp.float32(0), bases)[0]

    a, x, b, base = arguments()
    jaxpr = jax.make_jaxpr(jax.jit(jax.grad(loss)))(a, x, b, jnp.stack([base, base]))
    assert jaxprs.matrix_products(jaxpr, (IN, OUT))


def test_a_kept_dense_matrix_is_found():
    a, x, b, codes = arguments(jnp.int8)
    bad = jaxprs.computed_residuals(lambda a, x: dequantised(a, x, b, codes), a, x)
    again = jaxprs.computed_residuals(jax.checkpoint(lambda a, x: dequantised(a, x, b, codes)), a, x)
    assert (IN, OUT) in [tuple(shape) for shape in bad]
    assert (IN, OUT) not in [tuple(shape) for shape in again]
