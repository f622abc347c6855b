"""jaxft combine from adapters that peft made to one that peft loads."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.test_verbs import FLOAT, jaxft, logits


def test_parts_of_an_adapter_make_it_whole(capsys, tiny, adapter, tmp_path):
    for how, more in (("cat", []), ("ties_svd", ["--density", "1", "--rank", "4"])):
        weights = ["--weights", "0.25,0.75"] if how == "cat" else []
        out = tmp_path / how
        words = ["combine", adapter, adapter, FLOAT, *weights, "--how", how, *more, "--out", out]
        code, said, err = jaxft(capsys, *words)
        assert code == 0 and str(out) in said, err
        assert abs(logits(tiny, out) - logits(tiny, adapter)).max() < 1e-3
    config = json.loads((tmp_path / "cat" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["base_model_name_or_path"] == str(tiny)


def test_a_saved_module_that_did_not_move_stays_the_models(capsys, tiny, adapter, tmp_path):
    """The base is taken as it is stored, so nothing of it is rounded."""
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    head = load_file(tiny / "model.safetensors")["lm_head.weight"]
    tensors = load_file(adapter / "adapter_model.safetensors") | {"base_model.model.lm_head.weight": head}
    (tmp_path / "head").mkdir()
    save_file(tensors, tmp_path / "head" / "adapter_model.safetensors")
    (tmp_path / "head" / "adapter_config.json").write_text(json.dumps(config))
    words = ["combine", tmp_path / "head", adapter, "--weights", "0.5,0.5", "--out", tmp_path / "out"]
    code, _, err = jaxft(capsys, *words)
    assert code == 0, err
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    np.testing.assert_array_equal(made["base_model.model.lm_head.weight"], head)


def test_what_cannot_be_is_said_before_anything_is_loaded(capsys, tiny, adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    out = ["--out", tmp_path / "out"]
    for words, message in (
        ([adapter, other], f"different bases: {tiny}, elsewhere; if they are the same, say model.path="),
        ([adapter, tiny], f"{tiny}: expected the folder of an adapter"),
        ([adapter, adapter, "--weights", "1;2"], "--weights: got '1;2'"),
        ([adapter, adapter, "--weights=nan,1"], "--weights: got 'nan,1'; expected numbers"),
        ([adapter, adapter, "--how", "ties"], "density: ties keeps a share of the numbers"),
    ):
        code, _, err = jaxft(capsys, "combine", *words, *out)
        assert code in (1, 2) and message in err, err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        jaxft(capsys, "combine", adapter, "--how", "slerp", *out)
