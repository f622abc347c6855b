"""An adapter's directory: what is written, literally; what is refused, by name; and nothing by halves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.core import tree
from jaxft.peft import LoRA, disk, store
from jaxft.peft.disk import AdapterError
from tests.peft import pairs


def test_directory_is_minimal_and_literal(tmp_path, key):
    """Every file, config field and tensor, as a literal; only fields that peft has had since 0.6."""
    config = LoRA(
        rank=2, alpha=3, targets=("q_proj", "down_proj"), layers=(1,), rank_pattern={"q_proj": 1}, dropout=0.1
    )
    params = pairs.adapted("llama", config, key)
    directory = pairs.save("llama", params, tmp_path / "adapter", base_model_name_or_path="org/base")
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert json.loads((directory / "adapter_config.json").read_text()) == {
        "alpha_pattern": {},
        "base_model_name_or_path": "org/base",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": [1],
        "lora_alpha": 3,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 1,
        "rank_pattern": {"down_proj": 2},
        "target_modules": ["down_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
    }
    tensors = load_file(directory / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1"
    assert {name: (t.shape, t.dtype.name) for name, t in tensors.items()} == {
        f"{layer}.self_attn.q_proj.lora_A.weight": ((1, 32), "float32"),
        f"{layer}.self_attn.q_proj.lora_B.weight": ((32, 1), "float32"),
        f"{layer}.mlp.down_proj.lora_A.weight": ((2, 48), "float32"),
        f"{layer}.mlp.down_proj.lora_B.weight": ((32, 2), "float32"),
    }
    w = params["layers"]["attn"]["q"]
    np.testing.assert_array_equal(tensors[f"{layer}.self_attn.q_proj.lora_B.weight"], w.b[1, :1].T)


def test_default_choices_are_short(tmp_path, key):
    """Names as users write them, not lists of every module; newer fields only where they say something."""
    cases = {
        ("q_proj", "v_proj"): (LoRA(rank=2, targets=("q_proj", "v_proj")), {}),
        ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"): (LoRA(rank=2), {}),
        ("q_proj",): (LoRA(rank=2, targets=("q_proj",), rslora=True), {"use_rslora": True}),
    }
    old = set(
        json.loads(
            (
                pairs.save("llama", pairs.adapted("llama", LoRA(), key), tmp_path / "x") / "adapter_config.json"
            ).read_text()
        )
    )
    for i, (modules, (config, more)) in enumerate(cases.items()):
        directory = pairs.save("llama", pairs.adapted("llama", config, key), tmp_path / str(i))
        written = json.loads((directory / "adapter_config.json").read_text())
        assert tuple(written["target_modules"]) == modules
        assert {k: v for k, v in written.items() if k not in old} == more
        assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (2, 4, {})


def test_layers_that_differ_by_module_are_named_in_full(tmp_path, key):
    """peft has no short way to say q_proj in layer 0 and v_proj in layer 2: each module is named."""
    config = LoRA(rank=2, targets=r".*0.self_attn.q_proj|.*2.self_attn.v_proj")
    directory = pairs.save("llama", pairs.adapted("llama", config, key), tmp_path / "adapter")
    written = json.loads((directory / "adapter_config.json").read_text())
    assert written["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.v_proj"]
    assert written["layers_to_transform"] is None


def test_bfloat16_adapter(tmp_path, key):
    """What peft saved in bfloat16 is trained on in float32, and what we hold in bfloat16 is saved so."""
    params = pairs.adapted("llama", LoRA(rank=2, targets=("q_proj",)), key)
    half = jax.tree.map(lambda p, m: p.astype(jnp.bfloat16) if m else p, params, tree.trainable_mask(params))
    directory = pairs.save("llama", half, tmp_path / "adapter")
    assert {t.dtype.name for t in load_file(directory / "adapter_model.safetensors").values()} == {"bfloat16"}
    again = pairs.load("llama", directory)
    assert again["layers"]["attn"]["q"].a.dtype == jnp.float32
    np.testing.assert_array_equal(again["layers"]["attn"]["q"].a, half["layers"]["attn"]["q"].a.astype(jnp.float32))
    np.testing.assert_allclose(
        pairs.torch_logits(pairs.peft_load("llama", directory)), pairs.logits("llama", again), atol=1e-5
    )


def test_embed_out_of_an_older_transformers(tmp_path, key):
    """gpt_neox's head used to be the module embed_out."""
    params = pairs.adapted("gpt_neox", LoRA(rank=2, targets=("lm_head", "dense")), key)
    directory = pairs.save("gpt_neox", params, tmp_path / "adapter")
    rewrite(directory, config=lambda c: c | {"target_modules": ["embed_out", "dense"]})
    rename(directory, "lm_head", "embed_out")
    np.testing.assert_array_equal(
        pairs.logits("gpt_neox", pairs.load("gpt_neox", directory)), pairs.logits("gpt_neox", params)
    )


def test_saved_base_embedding_replaces_ours(tmp_path):
    """peft loads the base weight that it saved with an adapted embedding into the model, and so do we."""
    made = pairs.peft_model("llama", peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    base = made.get_input_embeddings().base_layer.weight
    base.data += 0.1
    params = pairs.load("llama", pairs.peft_save(made, tmp_path / "adapter"))
    np.testing.assert_array_equal(params["embed"]["tokens"].base, base.detach().numpy())
    np.testing.assert_allclose(pairs.logits("llama", params), pairs.torch_logits(made), rtol=0, atol=1e-5)


def test_two_adapters_load_one_on_the_other(tmp_path):
    """Their updates add; peft's format holds one adapter, so both together are saved in ours."""
    one, two = (pairs.adapted("llama", LoRA(rank=2, targets=("q_proj",)), jax.random.key(i)) for i in (1, 2))
    pairs.save("llama", one, tmp_path / "1")
    pairs.save("llama", two, tmp_path / "2")
    loaded = pairs.ours("llama")
    both = store.load(pairs.load("llama", tmp_path / "1"), loaded.names, loaded.config.num_layers, tmp_path / "2")
    dense = [p["layers"]["attn"]["q"].dense() for p in (one, two, both)]
    base = loaded.params["layers"]["attn"]["q"]
    np.testing.assert_allclose(dense[2] - base, dense[0] + dense[1] - 2 * base, atol=1e-6)
    pairs.save("llama", both, tmp_path / "3")
    assert json.loads((tmp_path / "3" / disk.CONFIG).read_text())["peft_type"] == "JAXFT"


def rewrite(directory, config=None, tensors=None) -> None:
    """Changes a saved adapter in place."""
    if config is not None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(config(json.loads(file.read_text()))))
    if tensors is not None:
        file = directory / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file, metadata={"format": "pt"})


def rename(directory, old: str, new: str) -> None:
    rewrite(directory, tensors=lambda t: {name.replace(old, new): array for name, array in t.items()})


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG = {
    "dora": ({"use_dora": True}, None, "no tensor .*lora_magnitude_vector"),
    "lora_bias": ({"lora_bias": True}, None, "no tensor .*lora_B.bias"),
    "a field of tomorrow": ({"use_magic": {"n": 1}}, None, "use_magic"),
    "token indices": ({"trainable_token_indices": [1, 2]}, None, "no tensor model.embed_tokens.token_adapter"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 3]]}, None, "layer_replication"),
    "pissa": ({"init_lora_weights": "pissa"}, None, "path_initial_model_for_weight_conversion"),
    "another method": ({"peft_type": "LOKI"}, None, "peft_type 'LOKI'; expected one of LORA"),
    "no method": ({"peft_type": None}, None, "peft_type None"),
    "no targets": ({"target_modules": None}, None, "target_modules"),
    "missing factor": (None, lambda t: {k: v for k, v in t.items() if k != Q}, r"no tensor model.layers.0.*lora_A"),
    "missing module": (
        None,
        lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q" not in k},
        "no tensors of",
    ),
    "target too many": (
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
        None,
        "no tensors of model.layers.0.self_attn.k_proj",
    ),
    "target too few": ({"target_modules": ["v_proj"]}, None, "which target_modules does not select"),
    "unused tensor": (None, lambda t: t | {"base_model.model.extra.weight": t[Q]}, "unused tensors extra.weight"),
    "shape": (None, lambda t: t | {Q: t[Q][:, :5]}, r"q_proj.lora_A.weight: got shape \[2, 5\]; expected \[2, 32\]"),
    "rank": ({"r": 3}, None, r"got shape \[2, 32\]; expected \[3, 32\]"),
    "saved module missing": ({"modules_to_save": ["lm_head"]}, None, "no tensor lm_head.weight"),
    "saved module unknown": ({"modules_to_save": ["score"]}, None, "modules_to_save: 'score' selects no weight"),
    "saved module of one layer": ({"modules_to_save": ["layers.1.mlp"]}, None, r"selects layers \[1\] of layers/mlp"),
    "a setting that we refuse": ({"lora_dropout": 1.0}, None, "peft.dropout: got 1.0"),
    "resized vocabulary": (
        None,
        lambda t: t | {"base_model.model.model.embed_tokens.weight": np.zeros((100, 32), np.float32)},
        r"embed_tokens.weight: got shape \[100, 32\]; expected \[97, 32\].*resized",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_by_name(case, tmp_path, key):
    config, tensors, message = WRONG[case]
    directory = pairs.save(
        "llama", pairs.adapted("llama", LoRA(rank=2, targets=("q_proj", "v_proj")), key), tmp_path / "adapter"
    )
    rewrite(directory, config and (lambda c: c | config), tensors)
    with pytest.raises(AdapterError, match=f"^{directory}.*{message}"):
        pairs.load("llama", directory)


def test_refused_files(tmp_path, key):
    """No adapter, a pickle, a damaged file: each says what to do."""
    with pytest.raises(AdapterError, match="no such directory"):
        pairs.load("llama", tmp_path / "nowhere")
    directory = pairs.save("llama", pairs.adapted("llama", LoRA(rank=2), key), tmp_path / "adapter")
    weights = directory / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match="fetch it again"):
        pairs.load("llama", directory)
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only pickled weights.*torch.load.*weights_only=True"):
        pairs.load("llama", directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match="download is not complete"):
        pairs.load("llama", directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not JSON"):
        pairs.load("llama", directory)


def test_writing_is_whole_or_nothing(tmp_path, key, monkeypatch):
    """An existing directory is refused, replaced only if it is an adapter and only by a complete one."""
    params = pairs.adapted("llama", LoRA(rank=2, targets=("q_proj",)), key)
    directory = pairs.save("llama", params, tmp_path / "adapter")
    before = (directory / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="overwrite=True"):
        pairs.save("llama", params, directory)
    other = pairs.adapted("llama", LoRA(rank=2, targets=("k_proj",)), key)
    with monkeypatch.context() as patch:
        patch.setattr(disk.json, "dumps", lambda *a, **k: 1 / 0)  # a crash after the weights are written
        with pytest.raises(ZeroDivisionError):
            pairs.save("llama", other, directory, overwrite=True)
    assert (directory / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"], "nothing is left behind"
    pairs.save("llama", other, directory, overwrite=True)
    assert "k_proj" in (directory / "adapter_config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="does not look like an adapter"):
        pairs.save("llama", params, tmp_path / "mine", overwrite=True)


def test_parameters_without_an_adapter(tmp_path):
    with pytest.raises(AdapterError, match="without an adapter"):
        pairs.save("llama", pairs.ours("llama").params, tmp_path / "adapter")
