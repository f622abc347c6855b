"""LoRA begun so as to make up for four bits, from the command line: trained, gone on with, read by transformers."""

import json

import numpy as np
import pytest

from jaxft.checkpoint import hf
from tests.cli.test_train import jaxft, metrics, torch_logits, words  # noqa: F401  (a fixture)

SHORT = [
    "quant.method=nf4", "peft.targets=[q_proj,down_proj]", "peft.rank=8", "checkpoint.every=2",
    "optim.schedule=constant", "eval.samples=0",
]  # fmt: skip


def trained(capsys, words, run, *more) -> list[float]:  # noqa: F811
    """The losses of four steps, the last two of which were gone on to."""
    for steps in (["train.steps=2"], ["train.steps=4", "--resume"]):
        code, _, err = jaxft(capsys, *words, *SHORT, *more, f"run_dir={run}", *steps)
        assert code == 0, err
    return [row["loss"] for row in metrics(run) if "loss" in row]


def loss(capsys, run, *more) -> float:
    code, out, err = jaxft(capsys, "eval", run, "--json", "--limit", "0", *more)
    assert code == 0, err
    return json.loads(out)["loss"]


def test_loftq_of_one_turn_is_an_adapter_of_the_plain_base(capsys, words, tiny, tmp_path):  # noqa: F811
    """Gone on with it is the run that was never stopped, bit for bit; its adapter goes on the base in four bits, and
    (nearly as well) on the one that never was."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    losses = trained(capsys, words, run, "peft.init=loftq")
    code, _, err = jaxft(capsys, *words, *SHORT, "peft.init=loftq", f"run_dir={whole}")
    assert code == 0, err
    assert losses == [row["loss"] for row in metrics(whole) if "loss" in row] and len(losses) == 4
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_lora_weights"], config["r"]) == ("LORA", True, 8)
    assert config["base_model_name_or_path"] == str(tiny) and not (run / "base").exists()
    last = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row][-1]
    assert loss(capsys, run) == pytest.approx(last, abs=1e-5)
    assert loss(capsys, run, "quant.method=none") == pytest.approx(last, rel=0.2)


def test_a_base_made_anew_is_kept_beside_its_adapter(capsys, words, tiny, tmp_path):  # noqa: F811
    """transformers and peft make of the two what was trained, and so do we."""
    run = tmp_path / "run"
    losses = trained(capsys, words, run, "peft.init=qpissa", "train.unroll=always")
    assert len(losses) == 4 and losses[-1] < losses[0]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "base")
    made, plain = hf.load(run / "base"), hf.load(tiny, "float32", quantize="nf4")
    same = {
        name: bool(np.array_equal(made.params["layers"][where][name].codes, plain.params["layers"][where][name].codes))
        for where, name in (("attn", "q"), ("attn", "k"), ("mlp", "down"))
    }
    assert same == {"q": False, "k": True, "down": False}
    last = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row][-1]
    assert loss(capsys, run) == pytest.approx(last, abs=1e-5)
    moved = abs(torch_logits(run / "base", run / "adapter") - torch_logits(tiny)).max()
    assert 0 < moved
    code, _, err = jaxft(capsys, "eval", run, "quant.method=none", "--limit", "0")
    assert code == 2 and "belongs to the four-bit base" in err
    code, _, err = jaxft(capsys, "merge", run, "--out", tmp_path / "merged")
    assert code == 0, err
    assert loss(capsys, tmp_path / "merged", *words[3:5], words[2]) == pytest.approx(last, abs=1e-4)


def test_refusals(capsys, words, tmp_path):  # noqa: F811
    four = tmp_path / "four"
    code, _, err = jaxft(capsys, "quantize", words[1].removeprefix("model.path="), "--out", four)
    assert code == 0, err
    for more, said in (
        (["peft.init=qpissa"], "expected one: quant.method=nf4"),
        (["peft.init=loftq", "peft.loftq.bits=4", "quant.method=nf4"], "stored in few bits already"),
        (["peft.init=loftq", f"model.path={four}"], "as it was before it was packed"),
        (["peft.init=loftq", "model.init=random", "quant.method=nf4"], "as it was before it was packed"),
    ):
        code, _, err = jaxft(capsys, *words, *more)
        assert code in (1, 2) and said in err, err
    assert not (tmp_path / "run").exists()
