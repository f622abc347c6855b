"""The TPU's kernel: interpreted against the dense product, and compiled by the TPU's compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxft.quant import four_bit, kernels, mosaic


@pytest.mark.parametrize(("kind", "block", "double"), [("nf4", 64, True), ("fp4", 32, False), ("nf4", 128, False)])
@pytest.mark.parametrize("rows", [1, 21])
def test_equals_the_dense_product(kind, block, double, rows):
    w = four_bit.quantize(0.02 * jax.random.normal(jax.random.key(0), (1024, 384), jnp.bfloat16), kind, block, double)
    x = jax.random.normal(jax.random.key(1), (rows, 1024), jnp.bfloat16)
    assert mosaic.fits(w)
    got = mosaic.product(x, w, interpret=True)
    np.testing.assert_allclose(got, x.astype(jnp.float32) @ w.dense().astype(jnp.float32), rtol=1e-5, atol=1e-5)


def test_what_does_not_divide_is_left_to_xla():
    made = [four_bit.quantize(jnp.ones(shape)) for shape in ((1024, 96), (640, 128), (2, 512, 128))]
    assert [mosaic.fits(w) for w in made] == [False, False, False]
    assert not kernels.few(jnp.ones((1, 512), jnp.bfloat16), four_bit.quantize(jnp.ones((512, 128)))), "on a CPU"


@pytest.mark.usefixtures("for_a_chip_elsewhere")
@pytest.mark.parametrize("rows", [1, 64])
def test_compiles_for_a_tpu_and_makes_nothing_dense(rows):
    chip = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
    size, out = 4096, 14336
    w = jax.eval_shape(four_bit.quantize, jax.ShapeDtypeStruct((size, out), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((rows, size), jnp.bfloat16)
    put = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=chip), (x, w))
    compiled = jax.jit(mosaic.product).lower(*put).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * 2 * size * out
    assert "product_four_bit" in compiled.as_text()
