"""LoftQ and QPiSSA on weights in few bits, against bitsandbytes' quantiser and torch's decomposition by turns."""

from types import SimpleNamespace

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxft
from jaxft.core import tree
from jaxft.core.names import Name
from jaxft.peft import LoftQ, LoRA, LoRAWeight, sites, store
from jaxft.quant import FourBit, QuantConfig, eight_bit, four_bit, pack
from tests.peft import pairs

L, D, F, RANK = 2, 128, 96, 8
NAMES = (Name("layers/w", "model.layers.{}.w", "linear"),)
KINDS = ("normal", "heavy")


def drawn(kind: str) -> np.ndarray:
    """Weights float32[L, D, F] of deviation 0.02: normal ones, or ones with Student's t tails (3 degrees)."""
    r = np.random.default_rng(1)
    w = r.standard_normal((L, D, F)) if kind == "normal" else r.standard_t(3, (L, D, F)) / np.sqrt(3)
    return (0.02 * w).astype(np.float32)


def adapted(w: np.ndarray, config: LoRA, packed=None, originals=True) -> LoRAWeight:
    base = four_bit.quantize(w, "nf4", 64, double_quant=False) if packed is None else packed
    known = (lambda name, index: jnp.asarray(w[index])) if originals else None
    params = sites.adapt({"layers": {"w": base}}, NAMES, jax.random.key(0), config, originals=known)
    return params["layers"]["w"]


def config(init: str, turns: int = 1, **more) -> LoRA:
    settings = {"loftq": LoftQ(iterations=turns)} if init == "loftq" else {"qpissa_turns": turns}
    return LoRA(rank=RANK, alpha=RANK, targets=("w",), init=init, **settings, **more)  # type: ignore[arg-type]


def rounded(w: np.ndarray) -> np.ndarray:
    """NF4 of one layer [in, out] by bitsandbytes."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(torch.tensor(w.T.copy()), blocksize=64, quant_type="nf4")).numpy().T


def best(w: np.ndarray) -> np.ndarray:
    u, s, vt = torch.linalg.svd(torch.tensor(w.astype(np.float64)), full_matrices=False)
    return ((u[:, :RANK] * s[:RANK]) @ vt[:RANK]).numpy()


def reference(w: np.ndarray, init: str, turns: int) -> np.ndarray:
    """What one layer becomes: Q + A B."""
    q = low = np.zeros_like(w)
    for _ in range(turns):
        if init == "loftq":
            q = rounded((w - low).astype(np.float32))
            low = best(w - q)
        else:
            low = best(w - q)
            q = rounded((w - low).astype(np.float32))
    return q + low


def lost(w: np.ndarray, made) -> np.ndarray:
    """Frobenius norms by layer."""
    return np.linalg.norm(w - np.asarray(made, np.float64), axis=(1, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("init", "turns"), [("loftq", 1), ("loftq", 4), ("qpissa", 1), ("qpissa", 4)])
def test_by_turns_as_the_papers_say(init, turns, kind):
    """To a thousandth of the error: a rounding of the decomposition moves single codes across a border."""
    w = drawn(kind)
    made = adapted(w, config(init, turns))
    assert isinstance(made.base, FourBit) and made.loftq is None and made.a0 is None
    right = np.stack([reference(layer, init, turns) for layer in w])
    assert np.linalg.norm(made.dense() - right) < (1e-4 if turns == 1 else 0.1) * lost(w, right).sum()
    np.testing.assert_allclose(lost(w, made.dense()), lost(w, right), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_quantisation_loses_less(kind):
    """By a tenth and more with rank 8 of 96; more turns never lose more."""
    w = drawn(kind)
    plain = lost(w, np.stack([rounded(layer) for layer in w]))
    for init in ("loftq", "qpissa"):
        errors = [lost(w, adapted(w, config(init, turns)).dense()) for turns in (1, 2, 4)]
        assert (errors[0] < 0.9 * plain).all()
        assert (errors[1] < errors[0]).all() and (errors[2] < errors[1]).all()


def test_one_turn_of_loftq_shares_the_base():
    w = drawn("normal")
    base = four_bit.quantize(w)
    assert adapted(w, config("loftq"), base).base is base
    anew = adapted(w, config("loftq", 2, layers=(1,)), base).base
    assert (anew.kind, anew.block, anew.made_from, anew.nested is None) == ("nf4", 64, "float32", False)
    np.testing.assert_array_equal(anew.codes[0], base.codes[0])  # a layer that is not adapted stays
    assert not np.array_equal(anew.codes[1], base.codes[1])
    assert tree.strip({"w": adapted(w, config("loftq"), base)})["w"].codes is base.codes


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits(kind):
    w = drawn("heavy")
    base = eight_bit.quantize(w, kind, exact=True)
    for init in ("loftq", "qpissa"):
        made = adapted(w, config(init), base)
        assert type(made.base) is type(base) and made.base.exact and made.base.kind == kind
        assert (lost(w, made.dense()) < 0.95 * lost(w, base.dense())).all()


def test_a_fast_decomposition_is_nearly_as_good():
    w = drawn("normal")
    exact, fast = (lost(w, adapted(w, config("loftq", pissa_iterations=n)).dense()) for n in (None, 8))
    assert (fast < 1.01 * exact).all() and not np.array_equal(fast, exact)


def test_a_model_reads_its_weights_again(tmp_path):
    """jaxft.load keeps where they lie; a weight left out of quantisation keeps its own start; saved and loaded, base
    and all, it is the same model."""
    quant = QuantConfig("nf4", block_size=32, skip="o_proj|mlp")
    folder = tmp_path / "model"
    pairs.torch_model("llama").save_pretrained(folder)
    model = jaxft.load(folder, "float32", quantize=quant)
    plain = jaxft.load(folder, "float32")
    for init, turns in (("loftq", 1), ("loftq", 2), ("qpissa", 1)):
        method = config(init, turns, dropout=0.0)
        method = LoRA(**(vars(method) | {"targets": ("q_proj", "o_proj"), "rank": 4}))
        params = jaxft.peft.adapt(model, jax.random.key(0), method)
        q, o = params["layers"]["attn"]["q"], params["layers"]["attn"]["o"]
        original = plain.params["layers"]["attn"]["q"]
        assert (lost(original, q.dense()) < lost(original, model.params["layers"]["attn"]["q"].dense())).all()
        np.testing.assert_allclose(o.dense(), plain.params["layers"]["attn"]["o"], atol=1e-6)
        directory = jaxft.save_adapter(model, params, tmp_path / f"{init}{turns}")
        again = jaxft.load_adapter(model, directory)
        tokens = np.arange(2, 12)[None]
        np.testing.assert_allclose(model.logprobs(again, tokens), model.logprobs(params, tokens), atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_eight_bit_base_made_anew_is_kept_in_the_adapter(kind, tmp_path):
    """The very codes, so that what is loaded computes the same bits."""
    params = pack(pairs.ours("llama").params, pairs.ours("llama").names, QuantConfig(kind))
    original = lambda name, index: tree.get(pairs.ours("llama").params, name.path)[index]  # noqa: E731
    model = SimpleNamespace(**(vars(pairs.model("llama")) | {"params": params, "originals": original}))
    method = LoRA(rank=4, targets=("q_proj",), init="qpissa", pissa_iterations=2)
    made = jaxft.peft.adapt(model, jax.random.key(0), method)
    names, layers = model.names, pairs.ours("llama").config.num_layers
    folder = store.save(made, names, layers, tmp_path / "adapter", methods=[method], base=params)
    again = store.load(params, names, layers, folder)
    q, before = again["layers"]["attn"]["q"].base, made["layers"]["attn"]["q"].base
    assert q.codes.dtype == before.codes.dtype
    np.testing.assert_array_equal(q.codes.astype(jnp.float32), before.codes.astype(jnp.float32))
    np.testing.assert_array_equal(pairs.logits("llama", again), pairs.logits("llama", made))
    assert not np.array_equal(pairs.logits("llama", again), pairs.logits("llama", params))


def test_refusals():
    w = drawn("normal")
    with pytest.raises(ValueError, match=r"loftq asks for model.layers.\{\}.w as it was.*FourBit\(nf4.*quantize="):
        adapted(w, config("loftq"), originals=False)
    with pytest.raises(ValueError, match=r"qpissa quantises what pissa leaves .*quant.method=nf4"):
        adapted(w, config("qpissa"), jnp.asarray(w), originals=False)
    with pytest.raises(ValueError, match=r"peft.loftq.bits: got 4; .* stored in few bits already"):
        adapted(w, LoRA(rank=RANK, targets=("w",), init="loftq", loftq=LoftQ(4)))
    with pytest.raises(ValueError, match=r"peft.qpissa_turns: got 0"):
        config("qpissa", 0)
