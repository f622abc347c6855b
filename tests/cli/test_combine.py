"""jaxft combine from adapters that peft made to one that peft loads."""

import json
import shutil

import pytest

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


def test_what_cannot_be_is_said_before_anything_is_loaded(capsys, tiny, adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    out = ["--out", tmp_path / "out"]
    for words, message in (
        ([adapter, other], f"different bases: {tiny}, elsewhere; if they are the same, say model.path="),
        ([adapter, tiny], f"{tiny}: expected the folder of an adapter"),
        ([adapter, adapter, "--weights", "1;2"], "--weights: got '1;2'"),
        ([adapter, adapter, "--how", "ties"], "density: ties keeps a share of the numbers"),
    ):
        code, _, err = jaxft(capsys, "combine", *words, *out)
        assert code in (1, 2) and message in err, err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        jaxft(capsys, "combine", adapter, "--how", "slerp", *out)
