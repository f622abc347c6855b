"""QLoRA from the command line: trained on a 4-bit base, gone on with, merged; and the base written for others."""

import json

import pytest

from jaxft.checkpoint import hf
from jaxft.quant import FourBit, IntGroups
from tests.cli.test_train import jaxft, metrics, torch_logits, words  # noqa: F401  (a fixture)


def test_qlora_from_config_to_a_merged_model(capsys, words, tiny, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    four = [*words, "quant.method=nf4", "optim.name=adamw_8bit", "checkpoint.every=2"]
    code, _, err = jaxft(capsys, *four)
    assert code == 0, err
    code, _, err = jaxft(capsys, *four, "train.steps=6", "--resume")
    assert code == 0, err
    losses = [row["loss"] for row in metrics(run) if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert abs(torch_logits(tiny, run / "adapter") - torch_logits(tiny)).max() > 1e-2

    code, out, err = jaxft(capsys, "eval", run, "--json", "--limit", "0")
    assert code == 0, err
    last = [row for row in metrics(run) if "eval_loss" in row][-1]
    assert abs(json.loads(out)["loss"] - last["eval_loss"]) < 1e-5
    code, out, err = jaxft(capsys, "merge", run, "--out", tmp_path / "merged")
    assert code == 0 and "error of rounding merged weights" in out, err
    report = json.loads((tmp_path / "merged" / "merge_errors.json").read_text())
    assert report["total"]["rounding"] < 1e-7 < 0.02 < report["total"]["packing"] < 0.12
    assert len(report["layers"]) == 14 and report["layers"]["model.layers.1.mlp.down_proj"]["update"] > 0
    code, out, err = jaxft(capsys, "eval", tmp_path / "merged", "--json", "--limit", "0", *words[3:5], words[2])
    assert code == 0, err
    assert abs(json.loads(out)["loss"] - last["eval_loss"]) < 1e-4
    code, out, err = jaxft(capsys, "merge", run, "--packed", "--out", tmp_path / "packed")
    assert code == 0 and "error of storing merged weights" in out, err
    assert isinstance(hf.load(tmp_path / "packed").params["layers"]["mlp"]["up"], FourBit)


def test_errors_of_products(capsys, words, tiny):  # noqa: F811
    told = ["--json", "--limit", "0", "--products", *words[2:6]]
    code, out, err = jaxft(capsys, "eval", tiny, *told, "quant.method=nf4", "quant.skip=v_proj")
    assert code == 0, err
    found = json.loads(out)["products"]
    assert len(found) == 12 and all(0.04 < error < 0.2 for error in found.values()), found
    code, out, err = jaxft(capsys, "eval", tiny, *told)
    assert code == 2 and "say how: quant.method=int8" in err


def test_a_base_is_written_in_four_bits_once(capsys, words, tiny, tmp_path):  # noqa: F811
    """Trained on what was written, a run is the run on the base packed while loading, on a mesh: to a rounding of the
    scales' mean, which adds up in another order there."""
    four = tmp_path / "four"
    code, out, err = jaxft(capsys, "quantize", tiny, "--out", four, "model.dtype=float32")
    assert code == 0, err
    assert "nf4:" in out and "bits each" in out
    assert isinstance(hf.load(four).params["layers"]["mlp"]["up"], FourBit)
    code, _, err = jaxft(capsys, "quantize", tiny, "--out", four)
    assert code == 1 and "not empty" in err
    code, _, err = jaxft(capsys, "quantize", four, "--out", tmp_path / "again")
    assert code == 1 and "quantised already" in err
    code, _, err = jaxft(capsys, "quantize", tiny, "--out", tmp_path / "fast", "quant.compute=fp8")
    assert code == 2 and "where the model is used" in err and not (tmp_path / "fast").exists()
    code, _, err = jaxft(capsys, "quantize", tiny, "--out", tmp_path / "eight", "quant.method=int8")
    assert code == 2 and "got int8; expected one of nf4, fp4, int4, int8_blockwise, gptq to" in err
    for extra, folder in ((["quant.method=nf4"], "a"), ([f"model.path={four}"], "b")):
        code, _, err = jaxft(capsys, *words, *extra, f"run_dir={tmp_path / folder}", "train.steps=2")
        assert code == 0, err
    a, b = ([r["loss"] for r in metrics(tmp_path / folder) if "loss" in r] for folder in "ab")
    assert a == pytest.approx(b, rel=1e-6)


def test_refusals(capsys, words, tmp_path):  # noqa: F811
    for extra, said in (
        (["quant.method=nf5"], "nf5"),
        (["quant.block_size=48", "quant.method=nf4"], "power of two"),
        (["quant.skip=.", "quant.method=nf4"], "leaves nothing to quantise"),
    ):
        code, _, err = jaxft(capsys, *words, *extra)
        assert code in (1, 2) and said in err, err
    assert not (tmp_path / "run").exists()


def test_a_base_is_quantised_with_the_runs_data(capsys, words, tiny, tmp_path):  # noqa: F811
    """GPTQ from the command line: nearer to the model than rounding is, on the data it was calibrated with."""
    rows, off = words[3], {}
    for method, extra in (("gptq", [rows, "data.max_length=64", "train.batch=2"]), ("int4", [])):
        out = tmp_path / method
        said = ["quant.block_size=32", f"quant.method={method}", "model.dtype=float32"]
        code, text, err = jaxft(capsys, "quantize", tiny, "--out", out, *said, *extra)
        assert code == 0, err
        assert f"{method}:" in text and "at 4.50 bits each" in text and "gptqmodel" in text
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "gptq" and config["group_size"] == 32
        model = hf.load(out, "float32")
        assert isinstance(model.params["layers"]["mlp"]["up"], IntGroups)
        code, text, err = jaxft(capsys, "eval", out, "--json", "--limit", "0", rows, "model.dtype=float32")
        assert code == 0, err
        off[method] = json.loads(text)["loss"]
    code, text, err = jaxft(capsys, "eval", tiny, "--json", "--limit", "0", rows, "model.dtype=float32")
    off = {method: abs(loss - json.loads(text)["loss"]) for method, loss in off.items()}
    assert off["gptq"] < 0.5 * off["int4"], off
    code, _, err = jaxft(capsys, "quantize", tiny, "--out", tmp_path / "none", "quant.method=gptq")
    assert code == 2 and "data.path=rows.jsonl" in err
    code, _, err = jaxft(capsys, *words, "quant.method=gptq")
    assert code in (1, 2) and "jaxft quantize MODEL quant.method=gptq" in err
    assert not (tmp_path / "none").exists()
