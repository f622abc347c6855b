"""Rows with different adapters. That each row meets its own, for every weight there is, is a conformance check."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import align, many
from jaxft.testing import subject
from jaxft.testing.jaxprs import equations
from tests.core import weights

IDS = (1, 0, -1, 1, -1)


def stacked(name, key):
    """Layer 1 of two members and one that does nothing."""
    w = weights.ROWS[name].build(key, jnp.float32)
    members = [*(subject.trained(w, jax.random.fold_in(key, i)) for i in range(2)), align.off(w)]
    each, common, _ = align.split(align.align(members))
    params = many.for_rows(many.wrap({"layers": {"w": each}}, {"layers": {"w": common}}, 3), IDS)
    return params["layers"]["w"][1]


def test_the_base_product_is_one(key):
    together = stacked("lora in affine", key)
    jaxpr = jax.make_jaxpr(lambda w, x: x @ w)(together, jnp.ones((len(IDS), 3, subject.IN)))
    size = (subject.IN, subject.OUT)
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general" and e.invars[1].aval.shape == size]
    assert len(products) == 1 and products[0].invars[0].aval.size == len(IDS) * 3 * subject.IN
    assert not [v for e in equations(jaxpr) for v in e.outvars if v.aval.shape[-2:] == size]


def test_vectors_of_norms(key):
    """What a norm asks of its vectors: `astype`, products and sums with activations, an offset."""
    scales = jax.random.normal(key, (2, 4))
    w = many.for_rows(many.wrap({"s": scales}, {"s": None}, 2), (-1, 0, -1))["s"]
    x = jnp.ones((3, 5, 4))
    for got, want in ((x * w.astype(jnp.float32), scales), (x * (1.0 + w), 1 + scales), (x + w, 1 + scales)):
        np.testing.assert_allclose(got, jnp.broadcast_to(want[jnp.array([1, 0, 1])][:, None], x.shape), rtol=1e-6)


def test_rows_without_a_member_are_refused(key):
    together = stacked("lora", key)
    with pytest.raises(ValueError, match=r"3 adapters on 4 rows.*for 5 rows.*for_rows"):
        jnp.ones((4, subject.IN)) @ together
    for ids in ([0, 2], [0, -2], [0.5, 1.0], [True, False], [[0, 1]], ["a"], [0, None]):
        with pytest.raises(ValueError, match=rf"got {re.escape(str(ids))}; expected .* one of 0 to 1, or -1 "):
            many.for_rows(together, ids)
    with pytest.raises(ValueError, match="no stacked adapters"):
        many.for_rows({"w": jnp.ones(3)}, (0,))
