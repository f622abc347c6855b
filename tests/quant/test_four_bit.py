"""NF4 and FP4 against bitsandbytes: codes, scales and nested scales to the bit, and its checkpoints both ways."""

import json

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.backends.default import ops

from jaxft import quant
from jaxft.core import tree
from jaxft.quant import bitsandbytes, blockwise, codebooks, four_bit

CASES = [
    (kind, shape, block, dtype)
    for kind in ("nf4", "fp4")
    for shape, block in (((96, 128), 64), ((40, 448), 64), ((128, 2048), 128), ((48, 96), 32), ((4, 4096), 4096))
    for dtype in ("float32", "bfloat16", "float16")
]
cases = pytest.mark.parametrize(("kind", "shape", "block", "dtype"), CASES)


def drawn(shape, dtype="float32", seed=0) -> torch.Tensor:
    """Weights [out, in] whose magnitude differs by row, with a block of zeros and one of equal numbers."""
    r = np.random.default_rng(seed)
    w = r.standard_normal(shape) * np.exp(r.standard_normal((shape[0], 1))) * 0.02
    w[1, :32], w[2, :32] = 0.0, 0.5
    return torch.tensor(w).to(getattr(torch, dtype))


def ours(w: torch.Tensor) -> jax.Array:
    return jnp.asarray(w.float().numpy().T).astype(str(w.dtype).removeprefix("torch."))


@cases
def test_codes_and_scales_are_those_of_bitsandbytes(kind, shape, block, dtype):
    w = drawn(shape, dtype)
    codes, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind)
    mine = four_bit.quantize(ours(w), kind, block, double_quant=False)
    stored = bitsandbytes.tensors(mine)
    np.testing.assert_array_equal(stored["weight"], codes.numpy())
    np.testing.assert_array_equal(stored["weight.absmax"], state.absmax.numpy())
    right = ops._dequantize_4bit_compute(codes.flatten(), state.absmax, state.code, block, shape, w.dtype)
    np.testing.assert_array_equal(np.asarray(mine.dense().astype(jnp.float32)).T, right.float().numpy())
    assert mine.dense().dtype == dtype and mine.dtype == kind and mine.shape == shape[::-1]


@cases
def test_double_quantisation(kind, shape, block, dtype):
    """Given bitsandbytes' offset (whose mean sums in another order) all is equal to its formula, bit for bit."""
    w = drawn(shape, dtype)
    _, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=True)
    mine = four_bit.quantize(ours(w), kind, block, double_quant=True)
    np.testing.assert_allclose(mine.offset, state.offset, rtol=1e-6)
    plain = bnb.quantize_4bit(w, blocksize=block, quant_type=kind)[1].absmax
    codes, largest = _blockwise(plain - float(mine.offset), state.state2.code)
    np.testing.assert_array_equal(np.asarray(mine.nested), largest)
    np.testing.assert_array_equal(np.asarray(mine.absmax).T.reshape(-1), codes)
    again = codebooks.dynamic().values[codes] * np.repeat(largest, 256)[: len(codes)] + np.asarray(mine.offset)
    np.testing.assert_allclose(np.asarray(mine.scales()).T.reshape(-1), again, rtol=1e-6)


def _blockwise(x: torch.Tensor, code: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """bitsandbytes' formula: its kernel for a CPU looks the index up in a coarser table."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 256)).reshape(-1, 256)
    largest = blocks.abs().amax(1)
    inverse = torch.where(largest > 0, 1 / largest, 0.0)
    found = torch.bucketize(blocks * inverse[:, None], (code[:-1] + code[1:]) / 2)
    return found.reshape(-1)[: len(x)].numpy(), largest.numpy()


def test_codebooks():
    for signed in (True, False):
        np.testing.assert_array_equal(codebooks.dynamic(signed).values, bnb.create_dynamic_map(signed).numpy())
    for kind in ("nf4", "fp4"):
        np.testing.assert_array_equal(codebooks.four_bit(kind).values, bnb.get_4bit_type(kind, "cpu").numpy())


def test_error_and_size():
    """The relative error of normal weights is NF4's .0085; a parameter takes half a byte and its share of scales."""
    w = jax.random.normal(jax.random.key(0), (2, 1024, 512)) * 0.02
    for made in (quant.nf4.quantize(w, double_quant=False), quant.nf4.quantize(w)):
        error = float(jnp.mean((made.dense() - w) ** 2) / jnp.mean(w**2))
        assert abs(error - 0.0085) < 1e-4
    assert made.nbytes / w.size < 0.517
    assert tree.count({"w": made}) == w.size


def test_it_behaves_like_an_array():
    w = jax.random.normal(jax.random.key(0), (3, 128, 48))
    q = quant.nf4.quantize(w)
    x = jax.random.normal(jax.random.key(1), (2, 5, 128))
    assert (q.shape, q.ndim, str(q.dtype), q[1].shape) == ((3, 128, 48), 3, "nf4", (128, 48))
    np.testing.assert_array_equal(q[1].dense(), q.dense()[1])
    np.testing.assert_array_equal(q[1:].dense(), q.dense()[1:])
    np.testing.assert_array_equal(q[1][None].dense(), q.dense()[1:2])
    with pytest.raises(IndexError, match=r"nf4\[128,48\].* has no layers to index"):
        q[1][:64]
    np.testing.assert_allclose(x @ q[1], x @ q[1].dense(), rtol=1e-5, atol=1e-5)
    assert (x.astype(jnp.bfloat16) @ q[1]).dtype == jnp.bfloat16 and q.astype(jnp.bfloat16).dtype == jnp.bfloat16
    ids = jnp.asarray([[0, 31, 32], [63, 64, 127]])
    np.testing.assert_array_equal(q[1].take(ids), q[1].dense()[ids])
    np.testing.assert_allclose(q[1].unembed(x[..., :48]), x[..., :48] @ q[1].dense().T, rtol=1e-5, atol=1e-5)
    sizes = jnp.asarray([2, 0, 3])
    want = jax.lax.ragged_dot(x[0], q.dense(), sizes)
    np.testing.assert_allclose(q.ragged_dot(x[0], sizes), want, rtol=1e-5, atol=1e-5)
    assert "nf4[3,128,48]" in repr(q) and "double quantised" in repr(q)
    assert jax.device_put(q, jax.devices()[1]).codes.devices() == {jax.devices()[1]}


def test_only_codes_are_kept_for_the_backward_pass():
    """Under a scan over layers no dense matrix is among the residuals."""
    q = quant.nf4.quantize(jax.random.normal(jax.random.key(0), (4, 64, 64)))

    def network(x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, q)[0])

    x = jnp.ones((3, 64))
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(network, x)[1], x))
    assert not [a for a in kept if a.shape[-2:] == (64, 64) and a.dtype != jnp.uint8]
    dense = jax.grad(lambda x: jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, q.dense())[0]))(x)
    np.testing.assert_allclose(jax.grad(network)(x), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_checkpoint_of_bitsandbytes_is_read_as_it_is(kind, double):
    w = drawn((96, 256), "bfloat16")
    codes, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=double)
    found = {"weight": codes, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    read = bitsandbytes.weight({k: v.numpy() for k, v in found.items()})
    want = ops._dequantize_4bit_compute(
        codes.flatten(), _absmax(state), state.code, state.blocksize, w.shape, torch.bfloat16
    )
    np.testing.assert_array_equal(np.asarray(read.dense().astype(jnp.float32)).T, want.float().numpy())
    again = bitsandbytes.tensors(read)
    assert again.keys() == found.keys()
    for name, array in again.items():
        if "quant_state" in name:
            assert json.loads(bytes(array)) == json.loads(bytes(found[name].numpy()))
        else:
            np.testing.assert_array_equal(array.reshape(-1), found[name].numpy().reshape(-1), err_msg=name)


def _absmax(state) -> torch.Tensor:
    if not state.nested:
        return state.absmax
    inner = state.state2
    return (
        torch.repeat_interleave(inner.absmax, 256)[: len(state.absmax)] * inner.code[state.absmax.int()] + state.offset
    )


BAD = {
    "block": (lambda w: four_bit.quantize(w, block_size=48), "block_size 48; expected a power of two"),
    "rows": (lambda w: four_bit.quantize(w[:-32]), "block_size 64 for .*96, 16.*Use one of at most 32"),
    "small": (lambda w: four_bit.quantize(w[:40], block_size=32), "Leave it as it is"),
    "kind": (lambda w: four_bit.quantize(w, "nf5"), "got kind 'nf5'; expected one of nf4, fp4"),
    "integers": (lambda w: four_bit.quantize(w.astype(int)), "expected a floating array"),
    "vector": (lambda w: four_bit.quantize(w[0]), "expected a floating array"),
    "nan": (lambda w: four_bit.quantize(w.at[3, 3].set(jnp.nan)), "not finite"),
    "inf": (lambda w: four_bit.quantize(w.at[3, 3].set(jnp.inf)), "not finite"),
    "compute": (lambda w: four_bit.quantize(w, compute="int4"), "got compute 'int4'; expected one of exact, int8, fp8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((128, 16)))


def _changed(found, **changes):
    (key,) = (k for k in found if "quant_state" in k)
    state = json.loads(bytes(found[key])) | changes
    return found | {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


CORRUPT = {
    "codebook": (lambda f: f | {"weight.quant_map": f["weight.quant_map"] * 0.9}, "quant_map: got a codebook"),
    "cut": (lambda f: f | {"weight": f["weight"][:-1]}, "weight: got .* numbers; expected"),
    "scale": (lambda f: {k: v for k, v in f.items() if k != "weight.absmax"}, "weight.absmax: missing"),
    "state": (lambda f: {k: (v[:40] if "state" in k else v) for k, v in f.items()}, "cannot be read"),
    "stateless": (lambda f: {k: v for k, v in f.items() if "state" not in k}, "got quant states none"),
    "shape": (lambda f: _changed(f, shape=[16, -128]), "expected the quant state"),
    "blocks": (lambda f: _changed(f, blocksize=96), "blocks of 96 across rows of 128"),
    "nested": (lambda f: _changed(f, nested_blocksize=64), "nested blocks of 64"),
    "odd": (lambda f: _changed(f, blocksize=1), "blocks of 1 across rows of 128"),
    "offset": (lambda f: _changed(f, nested_offset=None), "nested_offset None"),
    "offset nan": (lambda f: _changed(f, nested_offset=float("nan")), "nested_offset nan"),
    "nested scales": (lambda f: f | {"weight.nested_absmax": f["weight.nested_absmax"] * np.nan}, "not finite"),
    "scales": (lambda f: f | {"weight.absmax": f["weight.absmax"].astype("f4")}, "absmax: got float32; expected uint8"),
    "bytes alone": (lambda f: _alone(f, f["weight.absmax"]), "absmax: got uint8; expected floating"),
    "nan": (lambda f: _alone(f, np.full(32, np.nan, "f4")), "absmax: got scales that are negative or not finite"),
    "negative": (lambda f: _alone(f, np.full(32, -1, "f4")), "absmax: got scales that are negative or not finite"),
}


def _alone(found, absmax):
    """The same matrix without double quantisation."""
    found = _changed(found) | {"weight.absmax": absmax}
    (key,) = (k for k in found if "quant_state" in k)
    state = {k: v for k, v in json.loads(bytes(found[key])).items() if not k.startswith("nested")}
    found[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {k: v for k, v in found.items() if "nested" not in k}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_state_is_refused(name):
    change, message = CORRUPT[name]
    found = bitsandbytes.tensors(quant.nf4.quantize(jax.random.normal(jax.random.key(0), (128, 16))))
    with pytest.raises(ValueError, match=message):
        bitsandbytes.weight(change(found))


def test_scales_of_any_number():
    """Double quantisation pads the last block of scales and nothing of it is seen."""
    scales = jnp.abs(jax.random.normal(jax.random.key(0), (2, 700)))
    codes, nested, offset = blockwise.nest(scales)
    assert codes.shape == (2, 700) and nested.shape == (2, 3) and offset.shape == (2,)
    error = jnp.abs(blockwise.unnest(codes, nested, offset) - scales)
    assert float(jnp.max(error)) < 0.015 * float(jnp.max(nested))  # the widest gaps of the data type are 0.014 apart
