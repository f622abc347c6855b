"""jaxft inspect on adapters of peft and of ours, whole and damaged."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import peft as jaxft_peft
from jaxft.peft import AdaLoRA, LoRA, Norms, Pfeiffer
from tests.cli.test_verbs import jaxft
from tests.peft import pairs


def inspected(capsys, folder, code=0):
    got, out, err = jaxft(capsys, "inspect", folder, "--json")
    assert got == code, out + err
    return json.loads(out)


def test_an_adapter_of_peft(capsys, tiny, adapter):
    found = inspected(capsys, adapter)
    assert (found["method"], found["format"], found["base_model"]) == ("lora", "peft's LORA", str(tiny))
    assert found["settings"]["r"] == 4 and found["settings"]["lora_alpha"] == 8 and found["problems"] == []
    assert [g["modules"] for g in found["groups"]] == [
        "model.layers.{0-1}.mlp.down_proj", "model.layers.{0-1}.self_attn.q_proj"
    ]  # fmt: skip
    q = found["groups"][1]
    assert q["tensors"] == {"lora_A.weight": "F32[4, 64]", "lora_B.weight": "F32[64, 4]"} and q["count"] == 2
    assert q["parameters"] == 2 * 2 * 4 * 64 and q["bytes"] == 4 * q["parameters"]
    assert found["parameters"] == 2 * 4 * (64 + 64) + 2 * 4 * (64 + 128)
    tensors = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    norms = [np.linalg.norm(2 * tensors[stem.format(i, "B")] @ tensors[stem.format(i, "A")]) for i in range(2)]
    assert q["update"] == pytest.approx(sorted(norms), rel=1e-4)
    both = np.concatenate([tensors[stem.format(i, "A")] for i in range(2)])
    assert q["rms"]["lora_A.weight"] == pytest.approx(np.sqrt(np.mean(both**2)), rel=1e-4)


def test_the_table(capsys, adapter):
    code, out, _ = jaxft(capsys, "inspect", adapter)
    assert code == 0
    for words in ("method", "lora_alpha", "model.layers.{0-1}.self_attn.q_proj", "|update|"):
        assert words in out


def saved(tmp_path, config, size=0.1):
    params = jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), config)
    return pairs.save("llama", pairs.moved(params, jax.random.key(1), size), tmp_path / "adapter")


def test_ranks_and_layers_that_differ(capsys, tmp_path):
    config = LoRA(rank=4, targets=("q_proj", "up_proj"), layers=(0, 2), rank_pattern={"2.*q_proj": 7})
    found = inspected(capsys, saved(tmp_path, config))
    q, up = sorted(found["groups"], key=lambda g: "up" in g["modules"])
    assert q["modules"] == "model.layers.{0,2}.self_attn.q_proj" and q["tensors"]["lora_A.weight"] == "F32[4..7, 32]"
    assert up["count"] == 2 and found["settings"]["layers_to_transform"] == [0, 2]


def test_our_own_format(capsys, tmp_path):
    folder = saved(tmp_path, [Pfeiffer(reduction_factor=8), LoRA(rank=2, targets=("q_proj",))])
    found = inspected(capsys, folder)
    assert found["format"] == "jaxft's own, version 1" and found["method"] == "Bottleneck, LoRAWeight"
    assert {g["modules"] for g in found["groups"]} == {"layers/adapter", "layers/attn/q"}
    group = next(g for g in found["groups"] if g["modules"] == "layers/adapter")
    assert group["tensors"]["down"] == "F32[3, 32, 4]"


def test_pruned_adalora_and_saved_modules(capsys, tmp_path):
    config = AdaLoRA(rank=2, init_rank=3, targets=("q_proj",), modules_to_save=("lm_head",))
    params = pairs.moved(jaxft_peft.adapt(pairs.model("llama"), jax.random.key(0), config), jax.random.key(1))
    w = params["layers"]["attn"]["q"]
    left = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0]], np.float32)
    params["layers"]["attn"]["q"] = jax.tree.map(lambda a: a * left if a.shape == left.shape else a, w)
    found = inspected(capsys, pairs.save("llama", params, tmp_path / "adapter"))
    q = next(g for g in found["groups"] if "q_proj" in g["modules"])
    assert q["tensors"]["lora_E"] == "F32[0..3, 1]" and q["update"][0] == 0.0 < q["update"][1]
    assert found["modules_to_save"] == ["lm_head"] and found["method"] == "adalora"
    dense = q["update"][1]
    w = params["layers"]["attn"]["q"]
    assert dense == pytest.approx(float(max(np.linalg.norm(w.dense()[i] - w.base[i]) for i in range(3))), rel=1e-3)


def test_norms(capsys, tmp_path):
    found = inspected(capsys, saved(tmp_path, Norms(targets=("input_layernorm", "norm"))))
    assert found["problems"] == [] and found["method"] == "norms"
    assert "model.layers.{0-2}.input_layernorm" in [group["modules"] for group in found["groups"]]


def test_a_run_is_its_adapter_and_a_model_is_none(capsys, tiny, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    assert inspected(capsys, tmp_path / "run")["path"] == str(tmp_path / "run" / "adapter")
    code, _, err = jaxft(capsys, "inspect", tiny)
    assert code == 2 and "holds a whole model and no adapter" in err
    (tmp_path / "nothing").mkdir()
    code, _, err = jaxft(capsys, "inspect", tmp_path / "nothing")
    assert code == 1 and "no adapter_config.json (it is empty)" in err


def test_problems_are_told(capsys, adapter, tmp_path):
    """Each alone, on a copy of a good adapter."""
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"

    def spoilt(label, tensors=lambda t: t, config=lambda c: c, files=lambda d: None):
        folder = shutil.copytree(adapter, tmp_path / label)
        held, said = (
            load_file(folder / "adapter_model.safetensors"),
            json.loads((folder / "adapter_config.json").read_text()),
        )
        save_file(tensors(held), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config(said)))
        files(folder)
        return "\n".join(inspected(capsys, folder, code=1)["problems"])

    def nan(t):
        t[name.format("A")][0, :3] = np.nan
        return t

    assert "model.layers.1.self_attn.q_proj.lora_A.weight: 3 of 256 numbers are not finite" in spoilt("nan", nan)
    without = spoilt("half", lambda t: {k: v for k, v in t.items() if k != name.format("B")})
    assert without == "model.layers.1.self_attn.q_proj: no lora_B.weight"
    layer = spoilt("layer", lambda t: {k: v for k, v in t.items() if "layers.1.self_attn" not in k})
    assert layer == "model.layers.{1}.self_attn.q_proj: no tensors, unlike others"
    gone = spoilt("module", lambda t: {k: v for k, v in t.items() if "q_proj" not in k})
    assert gone == "target_modules: q_proj has no tensors"
    zero = spoilt("zero", lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()})
    assert "model.layers.{0-1}.self_attn.q_proj: the update is zero, as before training" in zero
    assert "does not know use_qalora = True" in spoilt("field", config=lambda c: {**c, "use_qalora": True})
    assert "lora_alpha: got None; expected a number" in spoilt("null", config=lambda c: {**c, "lora_alpha": None})
    assert "r: got 'four'; expected a number" in spoilt("words", config=lambda c: {**c, "r": "four"})
    ranks = spoilt("rank", config=lambda c: {**c, "r": 8})
    assert ranks.startswith("r: 8 in adapter_config.json, 4 in model.layers.0.") and ranks.count("layers") == 4
    layer = spoilt("nowhere", config=lambda c: {**c, "layers_to_transform": [0, 9]})
    assert layer == "layers_to_transform: 9 has no tensors"
    assert "peft_type 'POLY'" in spoilt("type", config=lambda c: {**c, "peft_type": "POLY"})
    assert "init_lora_weights" in spoilt("init", config=lambda c: {**c, "init_lora_weights": "pissa"})
    pickled = spoilt("pickle", files=lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"))
    assert "only pickled weights" in pickled and "weights_only=True" in pickled
    assert "x.pt: a pickle" in spoilt("beside", files=lambda d: (d / "x.pt").write_bytes(b"1"))
    cut = spoilt("cut", files=lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x10"))
    assert "damaged" in cut
