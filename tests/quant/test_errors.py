"""What few bits cost: errors of products layer by layer, and of merging, against numpy."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft
from jaxft.core import tree
from jaxft.core.weight import Weight
from jaxft.quant import QuantConfig, errors, pack
from tests.peft import pairs

TOKENS = np.array([[5, 9, 3, 7, 11, 2], [8, 4, 6, 0, 0, 0]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]], np.int32)
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def logits(params: tree.Params, batch) -> jax.Array:
    return pairs._logits(pairs.ours("llama").config, params, batch["tokens"])


def found(packed: tree.Params, dense: tree.Params, *batches) -> list[errors.Product]:
    return errors.products(dense, packed, pairs.ours("llama").names, batches, logits)


def test_every_product_in_order_of_execution():
    """Bases that are all an eighth too large give an eighth everywhere; the order is that of the forward pass."""
    names = pairs.ours("llama").names
    base = pack(pairs.ours("llama").params, names, QuantConfig("int8", skip="o_proj"))

    def each(fn):
        return jax.tree.map(
            lambda w: fn(w) if isinstance(w, Weight) else w, base, is_leaf=lambda w: isinstance(w, Weight)
        )

    larger = each(lambda w: dataclasses.replace(w, exact=True, scale=w.scale * 1.125))
    rows = found(larger, each(lambda w: w.dense()), {"tokens": TOKENS}, {"tokens": TOKENS[:, ::-1]})
    np.testing.assert_allclose([row.error for row in rows], 0.125, rtol=1e-4)
    assert errors.total(rows, "squared") == pytest.approx(0.125, rel=1e-4)
    assert [row.module.rpartition(".")[2] for row in rows] == [n for n in ORDER if n != "o_proj"] * 3
    assert rows[0].module == "model.layers.0.self_attn.q_proj" and "layers.2." in rows[-1].module


def test_the_first_layer_by_hand():
    """Normalised embeddings of the positions that are no padding, times both matrices."""
    loaded = pairs.ours("llama")
    packed = pack(loaded.params, loaded.names, QuantConfig("fp8"))
    (first, *_) = found(packed, loaded.params, {"tokens": TOKENS, "segments": SEGMENTS})
    x = np.asarray(loaded.params["embed"]["tokens"])[TOKENS[SEGMENTS > 0]]
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + loaded.raw["rms_norm_eps"])
    x = x * np.asarray(loaded.params["layers"]["attn_norm"]["scale"][0])
    right = x @ np.asarray(loaded.params["layers"]["attn"]["q"][0])
    got = np.asarray(jnp.asarray(x) @ packed["layers"]["attn"]["q"][0])
    assert first.error == pytest.approx(np.linalg.norm(got - right) / np.linalg.norm(right), rel=1e-2)
    assert first.size == pytest.approx(np.sum(right**2), rel=1e-4)
    with pytest.raises(ValueError, match="nothing in this model is stored in few bits"):
        found(loaded.params, loaded.params, {"tokens": TOKENS})


def test_merging():
    """Into bfloat16: the rounding, and what four bits would lose of it again; packed again, it is that."""
    loaded = pairs.ours("llama")
    base = pack(loaded.params, loaded.names, QuantConfig("nf4", block_size=32, skip="mlp"))
    method = peft.LoRA(rank=4, targets=("q_proj", "up_proj"), init="random")
    params = peft.adapt(SimpleNamespace(params=base, names=loaded.names), jax.random.key(0), method)
    rows = list(errors.merging(params, loaded.names, jnp.bfloat16))
    assert [row.module for row in rows] == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    again = errors.repacked(tree.merge(params), params, loaded.names)["layers"]["attn"]["q"]
    for i, row in enumerate(rows):
        w = params["layers"]["attn"]["q"][i]
        dense, update = np.asarray(w.base.dense()), float(w.scale) * np.asarray(w.a) @ np.asarray(w.b)
        exact = dense + update
        written = np.asarray(jnp.asarray(exact).astype(jnp.bfloat16).astype(jnp.float32))
        packed = np.asarray(w.base.repacked(jnp.asarray(written)).dense())
        right = [np.sum(np.square(a)) for a in (exact, update, written - exact, packed - exact)]
        np.testing.assert_allclose(np.array(row[1:], float), right, rtol=1e-3)
        assert again[i].kind == "nf4"
        assert np.sum(np.square(again[i].dense() - exact)) == pytest.approx(right[3], rel=0.05)  # not rounded first
    assert 1e-4 < errors.total(rows, "rounding") < 2**-8 < 0.03 < errors.total(rows, "packing") < 0.15
