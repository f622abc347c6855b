"""The README's lines for Flax models run as they stand."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import jaxft


def test_the_lines_in_the_readme():
    (lines,) = re.findall(r"```python\n(from jaxft\.flax import.*?)```", Path("README.md").read_text(), re.DOTALL)
    x, key = jnp.ones((2, 3, 8)), jax.random.key(0)
    model = nn.MultiHeadDotProductAttention(2)
    plain = model.init(key, x)
    nnx_model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    scope = {"jaxft": jaxft, "nnx": nnx, "optax": optax, "model": model, "variables": plain, "x": x, "key": key}
    exec(lines, scope := {**scope, "nnx_model": nnx_model})
    chex.assert_trees_all_equal_structs(scope["variables"], plain)
    chex.assert_trees_all_close(scope["y"], model.apply(plain, x))
    chex.assert_trees_all_close(scope["nnx_model"](x), nnx_model(x))
