"""GPTQ on whole models: what it measures against transformers' own layers, and perplexity on the embedded model."""

import functools
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxft
from jaxft import calibrate, data
from jaxft.core import tree, verbs
from jaxft.data import DataConfig, Loader
from jaxft.quant import QuantConfig, pack
from jaxft.quant import gptq as gptq_
from jaxft.quant.gptq import GPTQ
from jaxft.rollout import score
from scripts.tiny import documents
from tests.models import tiny
from tests.quant.test_gptq import algorithm

ASSETS = Path(__file__).resolve().parents[1] / "assets"
R = np.random.default_rng(0)
MODULES = {
    "llama": {"attn/k": (1, "self_attn.k_proj"), "attn/o": (2, "self_attn.o_proj"), "mlp/down": (2, "mlp.down_proj")},
    "gpt_neox": {"attn/qkv": (2, "attention.query_key_value"), "mlp/down": (1, "mlp.dense_4h_to_h")},
}


@pytest.mark.parametrize("name", MODULES)
def test_each_matrix_sees_what_the_earlier_ones_have_become(name, tmp_path):
    """A matrix does not change its own inputs: in the finished model, computed by transformers, they are what it was
    measured on, so the paper's algorithm with them gives the same matrix."""
    model = jaxft.load(tiny.save(name, tmp_path / "model"), dtype="float32")
    tokens = R.integers(3, 97, (6, 20))
    lengths = np.asarray([20, 20, 11, 20, 5, 20])
    segments = (np.arange(20) < lengths[:, None]).astype(np.int32)
    batches = [{"tokens": tokens[i : i + 3], "segments": segments[i : i + 3]} for i in (0, 3)]
    config = QuantConfig("gptq", block_size=16)
    params = calibrate.gptq(model, batches, config)
    jaxft.save_hf(model, params, tmp_path / "out", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    layers = theirs.gpt_neox.layers if name == "gpt_neox" else theirs.model.layers
    for path, (i, module) in MODULES[name].items():
        layers[i].get_submodule(module).register_forward_pre_hook(
            lambda _, inputs, path=path: seen.__setitem__(path, inputs[0])
        )
    with torch.no_grad():
        theirs(torch.tensor(tokens), attention_mask=torch.tensor(segments))
    for path, (i, _) in MODULES[name].items():
        x = seen[path].numpy()[segments > 0].astype(np.float64)
        bare = lambda w: getattr(w, "base", w)  # noqa: E731
        original, made = (np.asarray(_dense(bare(tree.get(p["layers"], path))[i])) for p in (model.params, params))
        want = algorithm(original.astype(np.float64), x.T @ x, GPTQ(), 16, True)
        assert (np.abs(made - want) < 1e-4 * np.abs(want).max()).mean() > 0.97, path


_dense = jax.jit(verbs.dense)


def test_what_cannot_be_measured_is_refused(tmp_path):
    model = jaxft.load(tiny.save("llama", tmp_path / "model"), dtype="float32")
    for batches, config, message in (
        ([], QuantConfig("gptq", block_size=16), "no position that counts"),
        (
            [{"tokens": jnp.ones((1, 8), int)}],
            QuantConfig("gptq", block_size=32),
            r"layers.0.mlp.down_proj.*groups of 32",
        ),
        ([{"tokens": jnp.ones((1, 8), int)}], QuantConfig("gptq", skip="."), "leaves nothing to quantise"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate.gptq(model, batches, config)


BLOCK = 128
OPTIMISED = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})  # here it pays


def test_perplexity_on_the_embedded_model(tmp_path, monkeypatch):
    """bf16 < GPTQ < rounding to the nearest at equal block size, the mean of three sets of calibration documents, and
    NF4 < rounding; on held-out documents, with the model's weights in the bfloat16 of its checkpoint."""
    model = jaxft.load(ASSETS / "tiny", dtype="float32")
    held = _rows(model, ASSETS / "data" / "general_heldout.jsonl", 2)
    for module, name, static in (
        (calibrate, "_grams", (0, 1, 2)),
        (calibrate, "_onward", (0, 1)),
        (gptq_, "_quantized", (2, 3, 4)),
    ):
        monkeypatch.setattr(module, name, OPTIMISED(getattr(module, name).__wrapped__, static_argnums=static))

    @OPTIMISED
    def total(params, batch):
        logp = score.make_score(model.config, dtype=jnp.float32)("policy", params, batch)["logp"]
        return jnp.sum(logp * batch["loss_mask"]), jnp.sum(batch["loss_mask"])

    def perplexity(params) -> float:
        dense = jax.tree.map(_dense, params, is_leaf=tree.is_weight)
        sums = np.sum([total(dense, batch) for batch in held], axis=0)
        return float(np.exp(-sums[0] / sums[1]))

    def gptq(seed: int) -> float:
        r, file = random.Random(f"calibration {seed}"), tmp_path / f"{seed}.jsonl"
        file.write_text("".join(json.dumps({"text": documents.document(r)}) + "\n" for _ in range(30)))
        return perplexity(calibrate.gptq(model, _rows(model, file, 1), QuantConfig("gptq", block_size=BLOCK)))

    nearest, nf4 = (perplexity(pack(model.params, model.names, QuantConfig(m, BLOCK))) for m in ("int4", "nf4"))
    calibrated = np.mean([gptq(seed) for seed in (1, 2, 3)])
    assert perplexity(model.params) < calibrated < nearest, (calibrated, nearest)
    assert nf4 < nearest, (nf4, nearest)


def _rows(model, path, count: int) -> list[dict[str, np.ndarray]]:
    """The first batches of a file's documents, packed into 8 rows of 512 tokens."""
    config = DataConfig(path=str(path), max_length=512, shuffle=False)
    loader = Loader(data.prepare(config, model.tokenizer).train, config, batch_rows=8)
    return [loader.batch(i) for i in range(count)]
