"""Weights packed while they are read, and checkpoints in bitsandbytes' format out and in."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxft
from jaxft.checkpoint import hf, writer
from jaxft.checkpoint.errors import CheckpointError
from jaxft.checkpoint.tensorfile import header
from jaxft.core import tree
from jaxft.quant import FourBit, QuantConfig, pack
from jaxft.sharding import mesh as meshes
from jaxft.sharding.mesh import MeshConfig
from tests.checkpoint import files
from tests.checkpoint.test_hf import MEASURE

TOKENS = np.random.default_rng(0).integers(3, 97, (2, 12))
FITS = QuantConfig("nf4", block_size=32, skip="down_proj")
same = np.testing.assert_array_equal


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "gemma2"])
@pytest.mark.parametrize("config", [FITS, QuantConfig("fp4", 32, double_quant=False, skip="down_proj|c_attn")])
def test_packed_while_read_is_packed_afterwards(name, config, saved):
    got, plain = hf.load(saved(name), quantize=config), hf.load(saved(name))
    jax.tree.map(same, got.params, pack(plain.params, plain.names, config))
    kept = {path for path, w in tree.paths(got.params, inside=False) if "down" in path and isinstance(w, FourBit)}
    assert not kept


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_on_a_mesh(shape, saved):
    """Every mesh gives the same bytes, sharded as the rules say."""
    mesh = meshes.create(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    got, plain = (hf.load(saved("llama_bias"), quantize=FITS, mesh=m) for m in (mesh, None))
    jax.tree.map(same, got.params, plain.params)
    codes = got.params["layers"]["mlp"]["gate"].base.codes
    assert codes.addressable_shards[0].data.shape == (3, 16 // shape[1], 48 // shape[2])


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A random llama whose widths are multiples of 64, as transformers saves it in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide") / "model"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def logits(folder: Path, **how) -> np.ndarray:
    """transformers' log-probabilities of each next token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor(TOKENS)).logits.float(), -1)[:, :-1]
    return logp.gather(-1, torch.tensor(TOKENS)[:, 1:, None])[..., 0].numpy()


def test_what_bitsandbytes_wrote_is_read_as_it_is(wide, tmp_path):
    """Its codes are ours of the same weights; dense, transformers computes the same with them."""
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(wide, quantization_config=how, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    read, made = jaxft.load(tmp_path / "theirs"), jaxft.load(wide, quantize="nf4")
    q, ours = (m.params["layers"]["mlp"]["down"] for m in (read, made))
    same(q.codes, ours.codes)
    np.testing.assert_allclose(q.scales(), ours.scales(), rtol=1e-3)
    jaxft.save_hf(read, read.params, tmp_path / "dense", dtype="float32")
    read = jaxft.load(tmp_path / "theirs", dtype="float32")
    np.testing.assert_allclose(read.logprobs(read.params, TOKENS), logits(tmp_path / "dense"), atol=2e-5)


def test_what_we_write_transformers_reads(wide, tmp_path):
    """And we read the very same codes. Its product on a CPU is in bfloat16."""
    model = jaxft.load(wide, quantize=QuantConfig("nf4", skip="k_proj"))
    jaxft.save_hf(model, model.params, tmp_path / "ours", packed=True, max_shard_size="20KB")
    again = jaxft.load(tmp_path / "ours")
    jax.tree.map(same, again.params, model.params)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").model.layers[1].self_attn
    assert type(found.q_proj).__name__ == "Linear4bit" and type(found.k_proj) is torch.nn.Linear
    exact = jaxft.load(tmp_path / "ours", dtype="float32")
    off = np.abs(logits(tmp_path / "ours") - exact.logprobs(exact.params, TOKENS))
    assert off.mean() < 0.03, "the two compute the same up to bfloat16, where quantisation costs 0.6"
    size = sum(tensor.nbytes for file in (tmp_path / "ours").glob("*.safetensors") for tensor in header(file).values())
    assert size < 0.65 * (wide / "model.safetensors").stat().st_size


def test_stored_four_bits_multiplied_in_eight(wide, tmp_path):
    """Asked of a checkpoint that is packed already, it changes the products and nothing that is stored."""
    model = jaxft.load(wide, quantize="nf4")
    jaxft.save_hf(model, model.params, tmp_path / "four", packed=True)
    fast = jaxft.load(tmp_path / "four", quantize=QuantConfig(compute="int8"))
    jax.tree.map(same, jax.tree.leaves(fast.params), jax.tree.leaves(model.params))
    off = np.abs(fast.logprobs(fast.params, TOKENS) - model.logprobs(model.params, TOKENS))
    assert 0 < off.mean() < 0.15, "quantisation itself costs 0.6"
    with pytest.raises(CheckpointError, match=r"without four-bit weights(.|\n)*compute=int8(.|\n)*quant.method=nf4"):
        jaxft.load(wide, quantize=QuantConfig(compute="int8"))
    with pytest.raises(ValueError, match=r"quant.compute: got fp8 with quant.method=none"):
        jaxft.model.random(wide, key=jax.random.key(0), quantize=QuantConfig(compute="fp8"))


def test_dense_is_what_is_written_by_default(wide, tmp_path):
    model = jaxft.load(wide, quantize="nf4")
    jaxft.save_hf(model, model.params, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain = jaxft.load(tmp_path / "dense")
    same(plain.params["layers"]["attn"]["q"], model.params["layers"]["attn"]["q"].dense())


def changed(folder: Path, change) -> None:
    """Rewrites the tensors of a checkpoint of one file."""
    files.write(folder, change({name: array for name, array in files.read(folder).items()}))


def without(name):
    return lambda found: {n: a for n, a in found.items() if n != name}


Q = "model.layers.1.self_attn.q_proj.weight"
WRONG = {
    "codebook": (lambda f: f | {f"{Q}.quant_map": f[f"{Q}.quant_map"] + 0.1}, r"q_proj.*quant_map: got a codebook"),
    "scales": (without(f"{Q}.absmax"), r"q_proj.*absmax: missing"),
    "codes": (without(Q), r"q_proj.*got a quant state without"),
    "state": (
        lambda f: f | {f"{Q}.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)},
        "quant state that cannot be",
    ),
    "mixed": (
        lambda f: {n: a for n, a in f.items() if not n.startswith(Q)} | {Q: np.zeros((64, 64), np.float32)},
        r"layers.1.self_attn.q_proj.*got a plain weight; expected a packed one",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_packed_checkpoint_is_refused(name, wide, tmp_path):
    model = jaxft.load(wide, quantize="nf4")
    jaxft.save_hf(model, model.params, tmp_path / "ours", packed=True)
    change, message = WRONG[name]
    changed(tmp_path / "ours", change)
    with pytest.raises(CheckpointError, match=message):
        jaxft.load(tmp_path / "ours")


def test_what_cannot_be_quantised_is_refused_by_name(saved, copy):
    with pytest.raises(CheckpointError, match=r"down_proj.*block_size 32 for \[48, 32\].*quant.skip"):
        hf.load(saved("llama"), quantize=QuantConfig("nf4", block_size=32))
    with pytest.raises(ValueError, match="leaves nothing to quantise"):
        hf.load(saved("llama"), quantize=QuantConfig("nf4", skip="."))
    with pytest.raises(ValueError, match=r"quant.method: got 'nf5'; expected one of none, nf4, fp4"):
        hf.load(saved("llama"), quantize="nf5")
    folder = copy("llama")
    tensors = files.read(folder)
    tensors["model.layers.2.mlp.up_proj.weight"][5, 5] = np.nan
    files.write(folder, tensors)
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.up_proj.*not finite"):
        hf.load(folder, quantize=FITS)
    model = hf.load(saved("llama"), quantize=FITS)
    writer.save(model, folder.parent / "packed", packed=True)
    with pytest.raises(CheckpointError, match="quantised already"):
        hf.load(folder.parent / "packed", quantize="nf4")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory accounts")
def test_peak_memory_is_the_packed_model_and_two_tensors(tmp_path):
    """The model in bfloat16 is 340 MB, its largest tensor 32 MB; packed 120 MB."""
    raw = {"model_type": "llama", "vocab_size": 8000, "hidden_size": 2048, "intermediate_size": 8192}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_act": "silu"}
    raw |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    script = MEASURE.replace("hf.load(directory, dtype)", 'hf.load(directory, dtype, quantize="nf4")')
    # compiled before the measurement: the compiler's own memory is not the model's
    script = script.replace("jnp.zeros(3)", WARM + "\njnp.zeros(3)", 1)
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path), "bfloat16"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    measured = json.loads(out.stdout)
    assert measured["beyond"] < 2 * measured["largest"], measured


WARM = 'hf.load(directory, dtype, quantize="nf4")'


def test_a_packed_model_is_loaded_in_the_dtype_asked_for(saved):
    model = hf.load(saved("llama"), "float32", quantize=FITS)
    assert model.params["layers"]["attn"]["q"].dense().dtype == jnp.float32
