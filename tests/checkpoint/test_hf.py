"""Reading: every tensor where it belongs, in the dtype and sharding asked for, in no more memory than promised."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.checkpoint import hf, layout, reader
from jaxft.checkpoint.errors import CheckpointError
from jaxft.checkpoint.tensorfile import Reader
from jaxft.core import tree
from jaxft.models import families
from jaxft.sharding import mesh as meshes
from jaxft.sharding.mesh import MeshConfig
from tests.checkpoint import files
from tests.models import tiny


def test_every_family_has_a_tiny_model():
    assert {make().model_type for make in tiny.CONFIGS.values()} == set(families.FAMILIES)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_tensor_is_read_to_its_place(name, saved):
    """Against the reference reader: our [L, in, out] is the stack of theirs, transposed if linear."""
    directory = saved(name)
    loaded = hf.load(directory, "float32")
    tensors = files.read(directory)
    leaves = dict(tree.paths(loaded.params))
    entries = layout.entries(loaded.config, loaded.names)
    assert set(leaves) == {entry.path for entry in entries}
    for entry in entries:
        parts = [tensors[t].T if entry.transposed else tensors[t] for t in entry.tensors]
        expected = np.stack(parts) if entry.stacked else parts[0]
        assert leaves[entry.path].dtype == jnp.float32
        np.testing.assert_array_equal(leaves[entry.path], expected, err_msg=entry.path)


def test_the_tree_of_a_llama_with_biases(saved):
    loaded = hf.load(saved("llama_bias"), "bfloat16")
    found = {path: (leaf.dtype.name, leaf.shape) for path, leaf in tree.paths(loaded.params)}
    shapes = {
        "embed/tokens": (97, 32),
        "final_norm/scale": (32,),
        "head": (32, 97),
        "layers/attn/k/base": (3, 32, 16),
        "layers/attn/k/bias": (3, 16),
        "layers/attn/o/base": (3, 32, 32),
        "layers/attn/o/bias": (3, 32),
        "layers/attn/q/base": (3, 32, 32),
        "layers/attn/q/bias": (3, 32),
        "layers/attn/v/base": (3, 32, 16),
        "layers/attn/v/bias": (3, 16),
        "layers/attn_norm/scale": (3, 32),
        "layers/mlp/down/base": (3, 48, 32),
        "layers/mlp/down/bias": (3, 32),
        "layers/mlp/gate/base": (3, 32, 48),
        "layers/mlp/gate/bias": (3, 48),
        "layers/mlp/up/base": (3, 32, 48),
        "layers/mlp/up/bias": (3, 48),
        "layers/mlp_norm/scale": (3, 32),
    }
    assert found == {path: ("bfloat16", shape) for path, shape in shapes.items()}


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(source, target, tmp_path):
    """Any stored dtype to any other, rounded once, as torch does."""
    made = tiny.model("llama", source)
    made.save_pretrained(tmp_path)
    loaded = hf.load(tmp_path, target)
    expected = made.state_dict()["model.layers.1.mlp.down_proj.weight"].to(getattr(torch, target)).float().numpy().T
    got = loaded.params["layers"]["mlp"]["down"][1]
    assert got.dtype == jnp.dtype(target)
    np.testing.assert_array_equal(got.astype(jnp.float32), expected)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_auto_is_the_checkpoints_dtype(source, tmp_path):
    tiny.model("llama", source).save_pretrained(tmp_path)
    assert hf.load(tmp_path, "auto").params["head"].dtype == jnp.dtype(str(source).removeprefix("torch."))
    files.config(tmp_path, dtype=None)
    assert hf.load(tmp_path, "auto").params["head"].dtype == jnp.dtype(str(source).removeprefix("torch."))


def test_float16_does_not_overflow_silently(copy):
    directory = copy("llama")
    tensors = files.read(directory)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    files.write(directory, tensors)
    with pytest.raises(CheckpointError, match=r"up_proj.*got a value of 100000; expected at most 65504"):
        hf.load(directory, "float16")
    assert hf.load(directory, "bfloat16").params["layers"]["mlp"]["up"][1, 4, 3] == jnp.bfloat16(1e5)


@pytest.mark.parametrize("name", ["llama_tied", "llama", "gpt2", "gpt_neox"])
def test_names_without_the_base_models_prefix(name, copy):
    """As saved from the model without its head (LlamaModel), or by the first gpt2."""
    directory = copy(name)
    expected = hf.load(directory, "float32").params
    tensors = files.read(directory)
    bare = {re.sub(r"^(model|transformer|gpt_neox)\.", "", key): value for key, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    files.write(directory, bare)
    got = hf.load(directory, "float32").params
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("gpt_neox", [f"gpt_neox.layers.0.attention.{n}" for n in ("bias", "masked_bias", "rotary_emb.inv_freq")]),
    ],
)
def test_constants_saved_by_old_versions_are_passed_over(name, constants, copy):
    directory = copy(name)
    expected = hf.load(directory).params
    files.write(directory, files.read(directory) | {constant: np.ones(4, np.uint8) for constant in constants})
    jax.tree.map(np.testing.assert_array_equal, hf.load(directory).params, expected)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(copy):
    directory = copy("llama_tied")
    tensors = files.read(directory)
    head = tensors["model.embed_tokens.weight"].copy()
    files.write(directory, tensors | {"lm_head.weight": head})
    assert "head" not in hf.load(directory).params
    head[50, 3] += 1
    files.write(directory, tensors | {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"lm_head.*differs from the embedding.*tie_word_embeddings"):
        hf.load(directory)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 2), (8, 1, 1)])
@pytest.mark.parametrize("name", ["llama_bias", "llama_tied"])
def test_sharded_loading_is_loading(name, shape, saved):
    """Every mesh gives the same values, each device holding what the rules say."""
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = meshes.create(MeshConfig(*shape), devices)
    plain = hf.load(saved(name), "float32")
    got = hf.load(saved(name), "float32", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, got.params, plain.params)
    gate = tree.get(got.params, "layers/mlp/gate")
    gate = gate if isinstance(gate, jax.Array) else gate.base
    assert gate.sharding == NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    assert gate.addressable_shards[0].data.shape == (3, 32 // shape[1], 48 // shape[2])


def test_a_sharding_of_ones_own(saved):
    """Even layers may be spread, and replicas may be donated one by one."""
    mesh = jax.make_mesh((3, 2), ("a", "b"), devices=jax.devices()[:6])

    def place(path, shape):
        return NamedSharding(mesh, PartitionSpec("a") if path.startswith("layers/") else PartitionSpec())

    got = hf.load(saved("llama"), "float32", sharding=place)
    plain = hf.load(saved("llama"), "float32")
    jax.tree.map(np.testing.assert_array_equal, got.params, plain.params)
    assert got.params["layers"]["attn"]["q"].addressable_shards[0].data.shape == (1, 32, 32)
    replicas = [shard.data for shard in got.params["head"].addressable_shards]
    jax.jit(lambda x: x + 1, donate_argnums=0)(replicas[0])
    for replica in replicas[1:]:
        np.testing.assert_array_equal(replica, plain.params["head"])


def test_assembling_on_the_device_equals_assembling_in_host_memory(saved):
    """What runs on accelerators, here on CPU devices: replicated, split by columns, split by rows."""
    dtype = jnp.bfloat16
    loaded = hf.load(saved("llama_bias"))
    tensors = hf.tensors_of(saved("llama_bias"))
    mesh = jax.make_mesh((2,), ("b",), devices=jax.devices()[:2])
    with Reader() as open_files:
        for entry in layout.entries(loaded.config, loaded.names):
            parts = [tensors[t] for t in entry.tensors]
            specs = {3: PartitionSpec(None, None, "b"), 2: PartitionSpec("b"), 1: PartitionSpec()}
            spec = specs[len(entry.shape)] if entry.shape[0] % 2 == 0 or len(entry.shape) == 3 else PartitionSpec()
            host = reader.read(open_files, entry, parts, np.dtype(dtype), NamedSharding(mesh, spec))
            groups = {}
            for device, index in host.sharding.addressable_devices_indices_map(entry.shape).items():
                bounds = tuple(s.indices(n)[:2] for s, n in zip(index, entry.shape, strict=True))
                groups.setdefault(bounds, []).append(device)
            arrays = reader._on_device(open_files, entry, parts, np.dtype(dtype), groups)
            device = jax.make_array_from_single_device_arrays(entry.shape, host.sharding, arrays)
            np.testing.assert_array_equal(device, host, err_msg=entry.path)


MEASURE = """
import json, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxft.checkpoint import hf, layout, tensorfile
from jaxft.models import families

directory, dtype = Path(sys.argv[1]), sys.argv[2]
raw = json.loads((directory / "config.json").read_text())
config, names = families.read(raw)
entries = layout.entries(config, names)
stored = [(name, np.dtype(jnp.bfloat16), entry.disk_shape) for entry in entries for name in entry.tensors]
tensorfile.write(directory / hf.SINGLE, stored, (np.ones(shape, kind) for _, kind, shape in stored))
largest = max(int(np.prod(shape)) * kind.itemsize for _, kind, shape in stored)


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


jnp.zeros(3).block_until_ready()
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory("VmRSS")
params = hf.load(directory, dtype).params
jax.block_until_ready(params)
beyond = memory("VmHWM") - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"largest": largest, "beyond": beyond}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory accounts")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_model_and_less_than_two_tensors(dtype, tmp_path):
    """Resident memory at its highest, less the model itself, against the largest tensor on disk (32 MB; of 140 MB)."""
    raw = {**tiny.SIZES, "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536}
    raw |= {"num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    out = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), dtype], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    measured = json.loads(out.stdout)
    assert measured["largest"] == 32000 * 512 * 2
    assert measured["beyond"] < 2 * measured["largest"], measured
