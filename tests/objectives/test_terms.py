"""Sums and weights."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.objectives import terms
from jaxft.objectives.terms import Mean


def test_masked_sums_by_hand():
    """Kept: 1, 2 and 4, so the total is 7 and the weight 3; their mean is 7/3."""
    x = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    keep = jnp.array([[True, True, False], [True, False, False]])
    mean = terms.masked(x, keep)
    assert (float(mean.total), float(mean.weight)) == (7.0, 3.0)
    assert float(terms.values({"x": mean})["x"]) == pytest.approx(7 / 3)


def test_adding_is_the_mean_over_both():
    """(2 + 10) / (1 + 3) = 3, where the mean of the means would be (2 + 10/3) / 2 = 2.67."""
    both = terms.add({"x": Mean(jnp.float32(2), jnp.float32(1))}, {"x": Mean(jnp.float32(10), jnp.float32(3))})
    assert float(terms.values(both)["x"]) == 3.0


def test_what_is_masked_has_no_effect_and_no_gradient():
    keep = jnp.array([[True, False]])
    x = jnp.array([[1.0, jnp.nan]])
    assert float(terms.masked(x, keep).total) == 1.0
    grad = jax.grad(lambda x: terms.masked(x, keep).total)(x)
    assert grad.tolist() == [[1.0, 0.0]]


def test_nothing_to_divide_by_is_zero_with_a_finite_gradient():
    value, grad = jax.value_and_grad(terms.divide)(jnp.float32(0), jnp.float32(0))
    assert (float(value), float(grad)) == (0.0, 0.0)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the mask \(2,\)"):
        terms.masked(jnp.ones((2, 3)), jnp.ones((2,), bool))
