"""Writing: what `transformers` then loads gives the same logits, and a directory appears whole or not at all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from jaxft import model as facade
from jaxft.checkpoint import hf, identity, tensorfile, writer
from jaxft.checkpoint.errors import CheckpointError
from jaxft.core import tree
from jaxft.core.weight import InPlace, Untied
from jaxft.models import decoder, heads
from jaxft.peft import LoRA, adapt
from jaxft.sharding import mesh as meshes
from jaxft.sharding.mesh import MeshConfig
from tests.checkpoint import files
from tests.models import tiny

TOKENS = np.random.default_rng(0).integers(3, 97, (2, 12))


def logits(model, params):
    """float32[B, T, V] of our own decoder."""
    hidden, _, _ = decoder.forward(model.config, params, jnp.asarray(TOKENS, jnp.int32))
    return heads.logits(model.config, heads.head_of(model.config, params), hidden)


def theirs(directory, **options):
    made = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **options)
    return tiny.logits(made.eval(), TOKENS)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_saved_model_is_the_same_in_transformers(name, saved, tmp_path):
    """Through our tree and back: the same tensors bit for bit, the same config, the same logits."""
    model = facade.load(saved(name), "float32")
    out = facade.save_hf(model, model.params, tmp_path / "out", max_shard_size="20KB")
    before, after = files.read(saved(name)), files.read(out)
    assert set(before) == set(after)
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    assert json.loads((out / "config.json").read_text()) == json.loads((saved(name) / "config.json").read_text())
    np.testing.assert_array_equal(theirs(out), theirs(saved(name)))


def test_shards_and_their_index(saved, tmp_path):
    model = facade.load(saved("llama"), "float32")
    out = facade.save_hf(model, model.params, tmp_path / "out", max_shard_size="20KB")
    index = json.loads((out / hf.INDEX).read_text())
    sizes = {k: v.nbytes for k, v in files.read(out).items()}
    assert index["metadata"] == {"total_parameters": sum(sizes.values()) // 4, "total_size": sum(sizes.values())}
    assert set(index["weight_map"]) == set(sizes)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard in shards:
        held = tensorfile.header(out / shard)
        assert all(index["weight_map"][name] == shard for name in held)
        assert sum(t.nbytes for t in held.values()) <= 20_000
    single = facade.save_hf(model, model.params, tmp_path / "single")
    assert sorted(path.name for path in single.iterdir()) == ["config.json", "generation_config.json", hf.SINGLE]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_of_the_files(dtype, saved, tmp_path):
    model = facade.load(saved("llama_bias"), "float32")
    out = facade.save_hf(model, model.params, tmp_path / "out", dtype=dtype)
    assert {t.dtype for t in tensorfile.header(out / hf.SINGLE).values()} == {
        {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    }
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    reference = tiny.model("llama_bias").to(getattr(torch, dtype)).state_dict()
    made = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert all(torch.equal(value, reference[key]) for key, value in made.state_dict().items())


def test_by_default_the_dtype_is_the_loaded_one(saved, tmp_path):
    model = facade.load(saved("llama"), "bfloat16")
    params = tree.replace(model.params, "layers/mlp/up", model.params["layers"]["mlp"]["up"].astype(jnp.float32))
    out = facade.save_hf(model, params, tmp_path / "out")
    assert {t.dtype for t in tensorfile.header(out / hf.SINGLE).values()} == {"BF16"}


def test_merge_then_save_equals_unmerged(saved, tmp_path, key):
    for name in ("llama", "llama_tied", "llama_bias"):
        model = facade.load(saved(name), "float32")
        params = adapt(model, key, LoRA(rank=4, targets="all-linear"))
        params = jax.tree.map(lambda t, a: a + 0.1 if t else a, tree.trainable_mask(params), params)
        expected = logits(model, params)
        assert np.abs(expected - logits(model, model.params)).max() > 0.1
        out = facade.save_hf(model, tree.merge(params), tmp_path / name)
        np.testing.assert_allclose(theirs(out), expected, atol=1e-4)


def test_adapters_are_not_written_as_a_model(saved, tmp_path, key):
    model = facade.load(saved("llama"), "float32")
    params = adapt(model, key, LoRA(rank=4, targets=["q_proj"]))
    with pytest.raises(CheckpointError, match=r"layers/attn/q: got a LoRA.*jaxft\.merge"):
        facade.save_hf(model, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_embedding_trained_alone_is_written_untied(saved, tmp_path):
    """The head keeps the original values: two tensors on disk, and a config that says so."""
    model = facade.load(saved("llama_tied"), "float32")
    tokens = model.params["embed"]["tokens"]
    params = tree.replace(model.params, "embed/tokens", InPlace(tokens, tokens + 0.5, tied=False))
    merged = tree.merge(params)
    assert isinstance(merged["embed"]["tokens"], Untied)
    out = facade.save_hf(model, merged, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(theirs(out), logits(model, params), atol=1e-5)
    again = facade.load(out, "float32")
    np.testing.assert_allclose(logits(again, again.params), logits(model, params), atol=1e-5)


def test_an_embedding_that_has_grown(saved, tmp_path):
    model = facade.load(saved("llama_tied"), "float32")
    tokens = model.params["embed"]["tokens"]
    grown = jnp.concatenate([tokens, jnp.ones((3, tokens.shape[1]))])
    out = facade.save_hf(model, tree.replace(model.params, "embed/tokens", grown), tmp_path / "out")
    assert facade.load(out).config.vocab_size == 100
    assert theirs(out).shape == (2, 12, 100)


def test_layers_held_apart_and_sharded_leaves(saved, tmp_path):
    model = facade.load(saved("llama_bias"), "float32")
    mesh = meshes.create(MeshConfig(2, 2, 2), jax.devices())
    sharded = facade.load(saved("llama_bias"), "float32", mesh=mesh)
    reference = files.read(facade.save_hf(model, model.params, tmp_path / "a"))
    for i, params in enumerate((tree.split_layers(model.params), sharded.params)):
        got = files.read(facade.save_hf(model, params, tmp_path / str(i)))
        assert all(np.array_equal(reference[key], got[key]) for key in reference)


def test_a_base_models_checkpoint_becomes_a_causal_language_models(copy, tmp_path):
    directory = copy("llama_tied")
    files.config(directory, architectures=["LlamaModel"])
    model = facade.load(directory, "float32")
    out = facade.save_hf(model, model.params, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_generation_config_travels(copy, tmp_path):
    directory = copy("llama")
    GenerationConfig(temperature=0.6, do_sample=True).save_pretrained(directory)
    model = facade.load(directory)
    out = facade.save_hf(model, model.params, tmp_path / "out")
    assert GenerationConfig.from_pretrained(out).temperature == 0.6


def test_a_directory_that_is_not_empty_is_refused(saved, tmp_path):
    model = facade.load(saved("llama"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty.*overwrite=True"):
        facade.save_hf(model, model.params, tmp_path)
    with pytest.raises(CheckpointError, match=r"does not look like a model"):
        facade.save_hf(model, model.params, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(CheckpointError, match=r"got a file"):
        facade.save_hf(model, model.params, tmp_path / "notes.txt", overwrite=True)


def test_overwriting_ones_own_source(copy):
    directory = copy("llama")
    model = facade.load(directory, "float32")
    params = tree.replace(model.params, "final_norm/scale", jnp.full(32, 2.0))
    facade.save_hf(model, params, directory, overwrite=True)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "generation_config.json", hf.SINGLE]
    assert float(facade.load(directory).params["final_norm"]["scale"][0]) == 2.0
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_midway_leaves_no_trace(overwrite, saved, copy, tmp_path, monkeypatch):
    """What was there stays as it was; no half-written directory remains."""
    target = copy("llama") if overwrite else tmp_path / "model"
    before = files.read(target) if overwrite else {}
    model = facade.load(saved("llama"), "float32")
    written = []
    host = writer._host

    def failing(piece, dtype):
        written.append(piece.name)
        if len(written) == 20:
            raise OSError(28, "No space left on device")
        return host(piece, dtype)

    monkeypatch.setattr(writer, "_host", failing)
    with pytest.raises(OSError, match="No space left"):
        facade.save_hf(model, model.params, target, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["model"] if overwrite else [])
    if overwrite:
        after = files.read(target)
        assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("20KB", 20_000), ("1.5MB", 1_500_000), ("1GiB", 2**30), (77, 77)]
)
def test_sizes(text, size):
    assert writer.size_of(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "5 apples", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="max_shard_size"):
        writer.size_of(text)


def test_the_fingerprint_of_a_base(saved, tmp_path, key):
    """The same wherever and however it is loaded; another for another model."""
    model = facade.load(saved("llama_bias"), "float32")
    mine = identity.fingerprint(model)
    assert len(mine) == 16
    moved = facade.load(facade.save_hf(model, model.params, tmp_path / "a", max_shard_size="9KB"), "float32")
    mesh = meshes.create(MeshConfig(2, 2, 2), jax.devices())
    assert identity.fingerprint(moved) == mine
    assert identity.fingerprint(facade.load(saved("llama_bias"), "bfloat16")) == mine
    assert identity.fingerprint(facade.load(saved("llama_bias"), "float32", mesh=mesh)) == mine
    adapted = adapt(model, key, LoRA(rank=2, targets="all-linear"))
    assert identity.fingerprint(hf.Loaded(model.config, model.names, adapted, model.raw)) == mine
    split = tree.split_layers(model.params)
    assert identity.fingerprint(hf.Loaded(model.config, model.names, split, model.raw)) == mine
    changed = tree.replace(model.params, "layers/attn/q", model.params["layers"]["attn"]["k"])
    assert identity.fingerprint(hf.Loaded(model.config, model.names, changed, model.raw)) != mine
    assert identity.fingerprint(facade.load(saved("llama"), "float32")) != mine
    theta = model.raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    assert identity.fingerprint(hf.Loaded(model.config, model.names, model.params, theta)) != mine
