"""What peft holds its methods to: without its adapter a model is the base, merged it is the same, saved it comes back.

Every method meets every kind of family, half of them on each of a float32, a bfloat16 and a 4-bit base. Several methods
share a model, each on a module of its own, as compiling takes most of the time. A row of `METHODS` that wraps modules
enters unasked.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft
from jaxft.core import tree
from jaxft.core.weight import NotMergeable
from jaxft.models import decoder, heads
from jaxft.peft import METHODS, store
from jaxft.quant import QuantConfig, pack
from tests.peft import pairs
from tests.peft.small import SMALL

FAMILIES, DTYPES = ("llama_tied", "qwen2", "gpt2", "gemma2"), ("float32", "bfloat16", "nf4")
NAMES = [name for name, method in METHODS.items() if issubclass(method.config, peft.Targeted)]
each = pytest.mark.parametrize(("family", "dtype"), [(family, dtype) for family in FAMILIES for dtype in DTYPES])


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Each program runs once or twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Many(NamedTuple):
    """A model with several methods on it, off their initialisation."""

    params: tree.Params
    placed: dict[str, str]
    """Method by path."""

    @property
    def mask(self) -> tree.Params:
        return tree.trainable_mask(self.params)

    def only(self, base: tree.Params, keep: list[str]) -> tree.Params:
        """``base`` with the adapted weights at some of the paths."""
        for path in keep:
            base = tree.replace(base, path, tree.get(self.params, path))
        return base


@functools.cache
def base(family: str, dtype: str) -> tree.Params:
    loaded = pairs.ours(family)
    if dtype == "nf4":
        return pack(tree.cast(loaded.params, jnp.bfloat16), loaded.names, QuantConfig("nf4", 32, skip="down_proj"))
    return tree.cast(loaded.params, jnp.dtype(dtype))


@functools.cache
def together(family: str, dtype: str) -> list[Many]:
    """Half of the methods, as many on a model as it has modules; which half, and who meets whom, differs by family."""
    names = pairs.ours(family).names
    paths = [name.path for name in names if name.stacked and name.kind in ("linear", "conv1d")]
    turn, found = FAMILIES.index(family), []
    half = NAMES[(turn + DTYPES.index(dtype)) % 2 :: 2]
    for i in range(0, len(half), len(paths)):
        placed = dict(zip(paths[turn:] + paths[:turn], half[i:], strict=False))
        configs = [
            dataclasses.replace(METHODS[name].config(), targets=(path,), **SMALL.get(name, {}))
            for path, name in placed.items()
        ]

        @jax.jit
        def adapt(params: tree.Params, configs=configs) -> tree.Params:
            model = pairs.model(family)
            model.params = params
            return peft.adapt(model, jax.random.key(0), configs)

        found.append(Many(_moved(adapt(base(family, dtype))), placed))
    return found


def _moved(params: tree.Params) -> tree.Params:
    draw = np.random.default_rng(0)

    def nudge(hit: bool, p: jax.Array) -> jax.Array:
        return jnp.asarray(p + 0.1 * draw.standard_normal(p.shape, np.float32)) if hit else p

    return jax.tree.map(nudge, tree.trainable_mask(params), jax.device_get(params))


def _broken(params: tree.Params) -> tree.Params:
    """With all trained numbers lost."""
    mask = tree.trainable_mask(params)
    return jax.tree.map(lambda hit, p: jnp.asarray(np.full(p.shape, np.nan, p.dtype)) if hit else p, mask, params)


def _logits(family: str, params: tree.Params) -> jax.Array:
    model = pairs.ours(family).config
    hidden, _, _ = decoder.forward(model, params, jnp.asarray(pairs.TOKENS), None, None)
    return heads.logits(model, heads.head_of(model, params), hidden).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def gradient(family: str, trainable: tree.Params, frozen: tree.Params) -> tuple[tree.Params, jax.Array]:
    def loss(trainable: tree.Params) -> tuple[jax.Array, jax.Array]:
        out = _logits(family, tree.combine(trainable, frozen))
        return jnp.mean(jnp.sin(out)), out

    return jax.grad(loss, has_aux=True)(trainable)


logits = jax.jit(_logits, static_argnums=0)
merge = jax.jit(tree.merge)


@each
def test_without_adapters_it_is_the_base(family, dtype):
    """To the bit; every adapter trains, and nothing of the base does."""
    for many in together(family, dtype):
        bare, original = dict(tree.paths(tree.strip(many.params))), dict(tree.paths(base(family, dtype)))
        assert bare.keys() == original.keys()
        assert all(np.array_equal(np.asarray(bare[path]), np.asarray(original[path])) for path in bare)
        trained = [path for path, hit in tree.paths(many.mask) if hit]
        assert {at for at in many.placed if any(path.startswith(f"{at}/") for path in trained)} == set(many.placed)
        assert not any(jax.tree.leaves(tree.strip(many.mask)))


@each
def test_gradients_and_merging(family, dtype):
    """Each trained array has a finite gradient that is not zero; merged once or twice the logits are those unmerged.

    What cannot be merged is refused by name, and stays where it is. On a bfloat16 base a merged weight is rounded once
    more, to 8 bits."""
    plain = logits(family, base(family, dtype))
    for many in together(family, dtype):
        gradients, out = gradient(family, *tree.partition(many.params, many.mask))
        for path, g in tree.paths(gradients):
            assert g.dtype == jnp.float32 and np.isfinite(g).all() and np.any(g), path
        assert np.abs(out - plain).max() > 1e-2
        fixed = [path for path in many.placed if not _mergeable(many, path)]
        if fixed:
            with pytest.raises(NotMergeable, match=fixed[0]):
                tree.merge(many.params)
        rest = many.only(base(family, dtype), [path for path in many.placed if path not in fixed])
        merged = merge(rest)
        close = np.abs(out).max() * (1e-5 if dtype == "float32" else 2.0**-4)
        np.testing.assert_allclose(logits(family, many.only(merged, fixed)), out, atol=close, err_msg=str(many.placed))
        again = tree.merge(merged)
        assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(merged), strict=True))
        lost = merge(_broken(rest))
        for path in set(many.placed) - set(fixed):
            assert not _finite(lost, path), f"{many.placed[path]} hides numbers that are not finite"


def _mergeable(many: Many, path: str) -> bool:
    return all(w.mergeable for w in tree.adapters(tree.get(many.params, path)))


def _finite(params: tree.Params, path: str) -> bool:
    return all(np.isfinite(np.asarray(p, np.float32)).all() for p in jax.tree.leaves(tree.get(params, path)))


def test_what_is_not_finite_is_not_merged():
    """The place is named, and the parameters are as usable as they were."""
    many, bare = together("qwen2", "bfloat16")[0], base("qwen2", "bfloat16")
    path = next(path for path in many.placed if _mergeable(many, path))
    params = many.only(bare, [path])
    with pytest.raises(ValueError, match=f"{path}.*not finite"):
        tree.merge(_broken(params))
    left = jax.tree.leaves(tree.strip(_broken(params)))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(left, jax.tree.leaves(bare), strict=True))
    assert _finite(tree.merge(params), path)


@each
def test_saved_and_loaded_it_is_the_same(family, dtype, tmp_path):
    """Bit for bit, each method by itself in peft's format; what only training needs is not stored."""
    loaded, empty = pairs.ours(family), base(family, dtype)
    for many in together(family, dtype):
        for path, name in many.placed.items():
            if METHODS[name].hf is None:
                continue
            params = many.only(empty, [path])
            directory = store.save(params, loaded.names, loaded.config.num_layers, tmp_path / name)
            again = dict(tree.paths(store.load(empty, loaded.names, loaded.config.num_layers, directory)))
            saved = dict(tree.paths(params))
            for where, array in again.items():
                np.testing.assert_array_equal(np.asarray(array), np.asarray(saved[where]), err_msg=f"{name}: {where}")
            assert {where for where, hit in tree.paths(tree.trainable_mask(params)) if hit} <= set(again)
