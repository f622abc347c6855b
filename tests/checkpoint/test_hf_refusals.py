"""What is wrong with a checkpoint is named (file, tensor, got, expected, way out) before any weight is read."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors

from jaxft.checkpoint import hf
from jaxft.checkpoint.errors import CheckpointError
from jaxft.checkpoint.tensorfile import Reader
from tests.checkpoint import files
from tests.models import tiny

UP = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00007.safetensors"


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    """A refusal comes from the headers alone."""

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Reader, "read", read)


def refused(directory, *parts, error=CheckpointError):
    """Asserts that loading fails with a message that holds every part."""
    with pytest.raises(error) as caught:
        hf.load(directory)
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message


def change(directory, **tensors):
    """Rewrites the weights as one file, with ``name=array`` replaced, or left out if None."""
    kept = {k: v for k, v in (files.read(directory) | tensors).items() if v is not None}
    files.write(directory, kept)


def test_a_truncated_shard(copy):
    directory = copy("llama")
    size = (directory / SHARD).stat().st_size
    os.truncate(directory / SHARD, size - 100)
    refused(directory, SHARD, f"{size - 100} bytes, truncated", f"expected {size} bytes", "fetch it again")


def test_a_shard_truncated_within_its_header(copy):
    directory = copy("llama")
    os.truncate(directory / SHARD, 50)
    refused(directory, SHARD, "got 50 bytes", "fetch it again")
    os.truncate(directory / SHARD, 0)
    refused(directory, SHARD, "got 0 bytes", "fetch it again")


def test_bytes_too_many(copy):
    directory = copy("llama")
    with open(directory / SHARD, "ab") as file:
        file.write(b"12345")
    refused(directory, SHARD, "fetch it again")


def test_a_shard_that_is_something_else(copy):
    directory = copy("llama")
    (directory / SHARD).write_text("<html>404 Not Found</html>")
    refused(directory, SHARD, "do not start with a safetensors header")
    (directory / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    refused(directory, SHARD, "git-lfs pointer", "git lfs pull")
    (directory / SHARD).write_bytes((10).to_bytes(8, "little") + b'{"a": 1}  ')
    refused(directory, SHARD, "a header that does not parse")


def test_a_shard_that_is_absent(copy):
    directory = copy("llama")
    (directory / SHARD).unlink()
    refused(directory, INDEX, f"no file {SHARD}", "all 7 shards", "fetch the missing files")


def test_an_index_that_names_the_wrong_file(copy):
    directory = copy("llama")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][UP] = "model-00001-of-00007.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    refused(directory, INDEX, f"no tensor {UP} in model-00001-of-00007.safetensors")


def test_an_index_that_is_no_index(copy):
    directory = copy("llama")
    (directory / INDEX).write_text("{}")
    refused(directory, INDEX, "an index without a weight map")


def test_a_missing_tensor(copy):
    directory = copy("llama")
    change(directory, **{UP: None})
    refused(directory, directory, f"no tensor {UP}", "every tensor that config.json asks for")


def test_many_missing_tensors_are_counted(copy):
    directory = copy("llama")
    files.config(directory, num_hidden_layers=5)
    refused(directory, "no tensor model.layers.3.input_layernorm.weight", "and 13 more")


def test_a_missing_head(copy):
    directory = copy("llama")
    change(directory, **{"lm_head.weight": None})
    refused(directory, "no tensor lm_head.weight", "base model without its head", "tie_word_embeddings")


def test_an_extra_tensor(copy):
    directory = copy("llama")
    change(directory, **{"model.layers.0.mlp.gate_proj.bias": np.zeros(48, np.float32)})
    refused(directory, "unused tensors model.layers.0.mlp.gate_proj.bias", "AutoModelForCausalLM")


def test_layers_too_many(copy):
    directory = copy("llama")
    files.config(directory, num_hidden_layers=2)
    refused(directory, "unused tensors model.layers.2.", "and 4 more")


def test_a_shape_that_differs(copy):
    directory = copy("llama")
    change(directory, **{UP: np.zeros((32, 48), np.float32)})
    refused(directory, "model.safetensors", f"tensor '{UP}'", "got shape [32, 48]", "expected [48, 32]")


def test_an_embedding_of_another_vocabulary(copy):
    directory = copy("llama")
    files.config(directory, vocab_size=100)
    refused(directory, "got shape [97, 32]", "expected [100, 32]", '"vocab_size": 97')


def test_a_dtype_that_is_not_read(copy):
    directory = copy("llama")
    tensors = {k: torch.as_tensor(v) for k, v in files.read(directory).items()}
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)
    files.write(directory, {})
    safetensors.save_file(tensors, directory / "model.safetensors")
    refused(directory, f"tensor '{UP}'", "dtype F8_E4M3", "F32, F16, BF16", "dequantise")


def test_a_quantised_checkpoint(copy):
    directory = copy("llama")
    files.config(directory, quantization_config={"quant_method": "quanto", "weights": "int4"})
    refused(directory, "config.json", "quantised with quanto", "original checkpoint")


def test_a_field_that_is_not_understood(copy):
    directory = copy("llama")
    files.config(directory, secret_multiplier=2.0)
    refused(directory, directory / "config.json", "secret_multiplier=2.0", error=ValueError)


def test_a_pickle_is_refused_with_a_conversion_that_works(tmp_path, monkeypatch):
    monkeypatch.undo()  # the converted checkpoint is read
    directory = tmp_path / "old"
    made = tiny.model("llama")
    made.config.save_pretrained(directory)
    torch.save(made.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        hf.load(directory)
    message = str(caught.value)
    assert "only pickled weights (pytorch_model.bin)" in message
    command = message[message.index('python -c "') :].removeprefix('python -c "').removesuffix('"')
    weights_only = command[: command.index("T.from_pretrained")]  # this one has no tokenizer
    subprocess.run([sys.executable, "-c", weights_only], check=True, capture_output=True)
    loaded = hf.load(tmp_path / "old-safetensors", "float32")
    expected = made.state_dict()["lm_head.weight"].numpy().T
    np.testing.assert_array_equal(loaded.params["head"], expected)


def test_no_weights_at_all(copy):
    directory = copy("llama")
    for file in directory.glob("model*"):
        file.unlink()
    refused(directory, "no weights (it holds config.json, generation_config.json)", "python -c")


def test_gguf(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "model-Q4_K_M.gguf", "a GGUF file", "safetensors")
    refused(tmp_path / "model-Q4_K_M.gguf", "a GGUF file", "safetensors")


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "an adapter", "load_adapter")


def test_an_empty_directory(tmp_path):
    refused(tmp_path, "no config.json (it holds nothing)")


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", "not JSON")


def test_a_file_in_place_of_its_directory(saved):
    refused(saved("llama") / "config.json", "got a file", f"Give {saved('llama')} instead")


def test_an_unknown_dtype(saved):
    with pytest.raises(ValueError, match=r"dtype: got 'int8'; expected one of float32, float16, bfloat16"):
        hf.load(saved("llama"), "int8")
