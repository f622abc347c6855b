"""jaxft run: stages one after the other, each on the model that the last one made, restartable at any of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jaxft import cli
from jaxft.cli import run as run_
from jaxft.cli import stages
from tests.cli.commands import metrics
from tests.cli.test_train import torch_logits

CHATS = [("Sort: 3 1 2", "1 2 3", "3 2 1"), ("Spell dog", "d o g", "dog dog"), ("Say hi", "hi", "no"),
         ("Add 2 and 3", "5", "I do not know")]  # fmt: skip


def turn(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture
def rows(tmp_path):
    """Chats, pairs and prompts on disk."""
    made = {
        "chats": [{"messages": turn("user", q) + turn("assistant", a)} for q, a, _ in CHATS],
        "pairs": [
            {"prompt": turn("user", q), "chosen": turn("assistant", a), "rejected": turn("assistant", b)}
            for q, a, b in CHATS
        ],
        "prompts": [{"prompt": turn("user", q), "answer": a, "task": "t"} for q, a, _ in CHATS],
    }
    for name, found in made.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return tmp_path


@pytest.fixture
def defaults(tiny):
    """What all stages have in common: short runs."""
    return {
        "model": {"path": str(tiny), "dtype": "float32"},
        "data": {"max_length": 64},
        "train": {"steps": 3, "remat": "none"},
        "optim": {"lr": 0.01, "warmup_steps": 0},
        "eval": {"samples": 0},
        "log": {"progress": False},
    }


@pytest.fixture
def here(monkeypatch):
    """Stages in this process, which compiles once; their commands are noted."""
    said = []

    def start(words):
        said.append(list(words))
        return cli.main(list(words))

    monkeypatch.setattr(run_, "start", start)
    return said


def pipeline(folder, defaults, **named):
    file = folder / "pipeline.yaml"
    file.write_text(
        yaml.safe_dump({"run_dir": str(folder / "p"), "defaults": defaults, "stages": named}, sort_keys=False)
    )
    return file


def jaxft(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def sft(rows, **more):
    return {"data": {"path": str(rows / "chats.jsonl")}, "peft": {"rank": 4}, **more}


def dpo(rows, **more):
    return {"data": {"path": str(rows / "pairs.jsonl")}, "objective": {"name": "dpo"}, **more}


@pytest.mark.parametrize("take", ["keep", "merge", "stack"])
def test_dpo_begins_from_the_policy_of_sft(capsys, here, rows, defaults, tiny, take):
    """Its reference is that policy, so the first loss is ln 2; what comes out is the first stage's model and more."""
    own = {} if take == "keep" else {"peft": {"rank": 2}}
    file = pipeline(rows, defaults, sft=sft(rows), dpo=dpo(rows, take=take, **own))
    code, out, err = jaxft(capsys, "run", file)
    assert code == 0, err
    first, second = rows / "p" / "01-sft", rows / "p" / "02-dpo"
    losses = [row["loss"] for row in metrics(second) if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < losses[0]
    assert [words[0] for words in here] == ["train", *(["merge"] if take == "merge" else []), "train"]
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["model"]["path"] == (str(first / "merged") if take == "merge" else str(tiny))
    tensors = load_file(second / "adapter" / "adapter_model.safetensors")
    before = load_file(first / "adapter" / "adapter_model.safetensors")
    if take == "keep":
        assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in before.items()}
        assert any(np.abs(tensors[k] - before[k]).max() > 1e-4 for k in before)
    if take == "merge":
        merged = torch_logits(first / "merged")
        assert abs(merged - torch_logits(tiny, first / "adapter")).max() < 1e-4
        assert abs(torch_logits(first / "merged", second / "adapter") - merged).max() > 1e-3
    code, out, err = jaxft(capsys, "run", file)
    assert code == 0 and "01-sft: complete" in out and "02-dpo: complete" in out and len(here) <= 3, err
    code, _, err = jaxft(capsys, "chat", rows / "p")
    assert code == 2 and "say which of them" in err and str(second) in err
    code, _, err = jaxft(capsys, "train", file)
    assert code == 2 and f"jaxft run {file}" in err


def test_stack_leaves_the_first_adapter_as_it_was(capsys, here, rows, defaults, tiny):
    """A third stage that learns nothing on two stacked ones is what the two are."""
    still = {"optim": {"lr": 1e-30}}
    file = pipeline(rows, defaults, sft=sft(rows), more=sft(rows, take="stack", **still))
    code, _, err = jaxft(capsys, "run", file, "eval.at_start=true", f"data.eval_path={rows / 'chats.jsonl'}")
    assert code == 0, err
    before, after = (
        [r["eval_loss"] for r in metrics(rows / "p" / n) if "eval_loss" in r] for n in ("01-sft", "02-more")
    )
    assert after[0] == pytest.approx(before[-1], abs=1e-5) and after[-1] == pytest.approx(before[-1], abs=1e-5)
    assert before[0] - before[-1] > 0.1


def test_whole_models_quantised_bases_and_reward_models(capsys, here, rows, defaults):
    """Full fine-tuning hands on its model, QLoRA its adapter on the same four-bit base; a reward model is the last."""
    file = pipeline(
        rows, defaults,
        domain={"data": {"path": str(rows / "chats.jsonl")}, "peft": "full", "optim": {"lr": 1e-3}},
        sft=sft(rows, quant={"method": "nf4"}),
        dpo=dpo(rows),
        reward={"data": {"path": str(rows / "pairs.jsonl")}, "objective": {"name": "reward"}, "take": "stack",
                "peft": {"rank": 2}},
    )  # fmt: skip
    code, out, err = jaxft(capsys, "run", file, "train.steps=2")
    assert code == 0, err
    domain, _, last, reward = (rows / "p" / name for name in ("01-domain", "02-sft", "03-dpo", "04-reward"))
    assert (domain / "model" / "model.safetensors").exists()
    config = yaml.safe_load((last / "config.yaml").read_text())
    assert config["model"]["path"] == str(domain / "model") and config["quant"]["method"] == "nf4"
    assert metrics(last)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert (reward / "adapter").is_dir() and "jaxft chat" not in out.split("The last of them")[1]
    code, _, err = jaxft(capsys, "eval", reward, f"data.path={rows / 'pairs.jsonl'}", "--json")
    assert code == 0, err


def test_a_complete_stage_is_refused_with_another_config_and_run_again_from_there(capsys, here, rows, defaults):
    stages = {"sft": sft(rows), "dpo": dpo(rows)}
    file = pipeline(rows, defaults, **stages)
    assert jaxft(capsys, "run", file)[0] == 0
    first = (rows / "p" / "01-sft" / "adapter" / "adapter_model.safetensors").read_bytes()
    code, _, err = jaxft(capsys, "run", file, "stages.dpo.objective.beta=0.5")
    assert code == 2 and "stage dpo is complete" in err and "objective.beta was 0.1 and is 0.5" in err
    assert "--from dpo" in err
    code, _, err = jaxft(capsys, "run", file, "stages.sft.train.steps=4")
    assert code == 2 and "train.steps was 3 and is 4" in err and "--from sft" in err
    before = len(here)
    code, out, err = jaxft(capsys, "run", file, "stages.dpo.objective.beta=0.5", "--from", "dpo")
    assert code == 0 and len(here) == before + 1, err
    assert (rows / "p" / "02-dpo.1" / "complete.json").exists() and f"kept as {rows / 'p' / '02-dpo.1'}" in out
    assert yaml.safe_load((rows / "p" / "02-dpo" / "config.yaml").read_text())["objective"]["beta"] == 0.5
    assert (rows / "p" / "01-sft" / "adapter" / "adapter_model.safetensors").read_bytes() == first
    (rows / "p" / "01-sft" / "complete.json").unlink()
    code, _, err = jaxft(capsys, "run", file, "stages.dpo.objective.beta=0.5")
    assert code == 2 and "--from sft" in err
    code, _, err = jaxft(capsys, "run", file, "--from", "dpo")
    assert code == 2 and "stage sft before it is not complete" in err
    other = pipeline(rows, defaults, sft=stages["sft"], more=sft(rows, take="stack"), dpo=stages["dpo"])
    code, _, err = jaxft(capsys, "run", other)
    assert code == 2 and "holds 02-dpo" in err


REFUSED = [
    ({"sft": {"take": "keep"}}, "`take`: got keep; no stage before"),
    ({"sft": {}, "dpo": {"take": "mergee"}}, "expected one of none, keep, merge, stack"),
    ({"sft": {}, "dpo": {"peft": {"rank": 2}}}, "take: stack trains another adapter"),
    ({"sft": {}, "dpo": {"take": "stack", "quant": {"method": "nf4"}}}, "`quant`: a stage with take: stack"),
    ({"sft": {}, "dpo": {"model": {"path": "x"}}}, "`model.path`: a stage with take: keep"),
    ({"sft": {"peft": "full"}, "dpo": {"take": "keep"}}, "leaves no adapter: take: merge"),
    ({"sft": {"peft": "prompt_tuning"}, "dpo": {}}, "learns a prompt"),
    ({"sft": {"peft": "houlsby"}, "dpo": {"take": "merge"}}, "houlsby, which cannot be merged"),
    ({"sft": {}, "dpo": {"take": "stack", "peft": "full"}}, "got full on a frozen adapter"),
    ({"sft": {"model": {"init": "random"}}, "dpo": {}}, "draws its model anew"),
    ({"sft": {"objective": {"name": "reward"}}, "dpo": {}}, "stage sft makes a reward model"),
    ({"sft": {}, "dpo": {"model": {"new_tokens": ["<t>"]}}}, "got <t>; under an adapter the vocabulary stays"),
    ({"sft": {"sweep": ["optim.lr=1,2"]}}, "`sweep`"),
    ({"sft": {"kind": "pretrain"}}, "expected one of train, generate"),
    ({"sft": {"checkpoint": {"keep_last": 0}}}, "checkpoint.keep_last"),
    ({"sft": {"optim": {"lrr": 1}}}, "did you mean `optim.lr`?"),
    ({"sft": {}, "dpo": {"take": "none", "reference": {"path": "stage:stf"}}}, "no stage 'stf' before this one"),
    ({"s f": {}}, "letters, digits"),
    ({"sft": {"config": "no_such"}}, "no config file 'no_such'"),
]


@pytest.mark.parametrize(("named", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refusals_come_before_anything_runs(capsys, here, rows, defaults, named, said):
    full = {n: {**(dpo if n == "dpo" else sft)(rows), **v} for n, v in named.items()}
    code, _, err = jaxft(capsys, "run", pipeline(rows, defaults, **full))
    assert code == 2 and said in err and "Traceback" not in err, err
    assert not here and not (rows / "p").exists()


def test_the_command_line_reaches_all_stages_or_one(capsys, rows, defaults):
    file = pipeline(rows, defaults, sft=sft(rows), dpo=dpo(rows, take="stack"))
    code, out, err = jaxft(capsys, "run", file, "--dry-run", "train.batch=2", "stages.dpo.optim.lr=0.5")
    assert code == 0 and not (rows / "p").exists(), err
    first, second = yaml.safe_load_all(out)
    assert first["train"]["batch"] == second["train"]["batch"] == 2
    assert (first["optim"]["lr"], second["optim"]["lr"]) == (0.01, 0.5)
    assert "# 02-dpo (train, stack the model of sft)" in out
    assert [method["method"] for method in second["peft"]] == ["adapter", "lora"]
    for word, said in (("stages.dop.optim.lr=1", "did you mean `dpo`?"), ("trian.batch=1", "did you mean `train`?")):
        code, _, err = jaxft(capsys, "run", file, word)
        assert code == 2 and said in err


def test_a_vocabulary_grows_once(capsys, rows, defaults):
    """Tokens that all stages name are there when the model is taken."""
    defaults["model"]["new_tokens"] = ["<a>", "<b>"]
    file = pipeline(
        rows, defaults, one=sft(rows), two=sft(rows, take="merge"), three=dpo(rows), four=sft(rows, take="merge")
    )
    more = ["stages.four.model.new_tokens=[<b>, <c>]"]
    code, out, err = jaxft(capsys, "run", file, "--dry-run", *more)
    assert code == 0, err
    found = [config["model"]["new_tokens"] for config in yaml.safe_load_all(out)]
    assert found == [["<a>", "<b>"], [], [], ["<c>"]]


def test_a_config_file_below_and_what_a_kept_adapter_does_not_use(capsys, rows, defaults):
    """The stage's own keys are over the file's; another objective comes with its own settings."""
    (rows / "own.yaml").write_text("peft: {method: dora, rank: 3}\nobjective: {name: dpo, beta: 0.3}\n")
    data = {"path": str(rows / "pairs.jsonl")}
    orpo = {"config": "own.yaml", "data": data, "take": "stack", "objective": {"name": "orpo"}, "peft": {"rank": 5}}
    file = pipeline(rows, defaults, sft=sft(rows), dpo={"config": "own.yaml", "data": data}, orpo=orpo)
    code, out, err = jaxft(capsys, "run", file, "--dry-run")
    assert code == 0, err
    assert "stage dpo (take: keep) does not use its own peft" in out
    _, second, third = yaml.safe_load_all(out[out.index("# 01-") :])
    assert second["objective"]["beta"] == 0.3 and second["peft"]["method"] == "adapter"
    assert third["objective"]["name"] == "orpo" and third["objective"]["beta"] == 0.1
    assert (third["peft"][1]["method"], third["peft"][1]["rank"]) == ("dora", 5)
    assert third["peft"][0]["path"] == str(rows / "p" / "02-dpo" / "adapter")


def test_killed_in_the_middle_it_goes_on(capsys, here, rows, defaults):
    """SIGKILL of the pipeline's process and of its stage's; then it is what it had been without."""
    long = {"train": {"steps": 12}, "checkpoint": {"every": 1}, "optim": {"schedule": "constant"}}
    file = pipeline(rows, defaults, sft=sft(rows, **long), more=sft(rows, take="stack", train={"steps": 1}))
    command = [sys.executable, "-m", "jaxft", "run", str(file), f"run_dir={rows / 'cut'}"]
    cut, ends = rows / "cut" / "01-sft", time.monotonic() + 300
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (cut / "checkpoints" / "2").is_dir():
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.01)
    stage = int((cut / ".lock").read_text().split()[1])
    os.kill(stage, signal.SIGSTOP)  # the pipeline cannot see it end
    process.kill()
    process.wait()
    os.kill(stage, signal.SIGKILL)
    assert not (cut / "complete.json").exists() and not (cut / "adapter").exists()
    reached = [line for line in (cut / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 2]
    code, out, err = jaxft(capsys, "run", file, f"run_dir={rows / 'cut'}")
    assert code == 0 and "Next: jaxft chat" in out, err
    assert [Path(words[1]).parts[-2] for words in here] == ["01-sft", "02-more"]
    assert (cut / "metrics.jsonl").read_text().splitlines()[:2] == reached  # to the time they took
    assert jaxft(capsys, "train", cut / "config.yaml", f"run_dir={rows / 'whole'}")[0] == 0
    whole, again = ([row for row in metrics(folder) if "loss" in row] for folder in (rows / "whole", cut))
    assert [row["step"] for row in again] == list(range(1, 13))
    # the process that was killed compiled with other flags than this one, so equal but for rounding
    np.testing.assert_allclose([r["loss"] for r in again], [r["loss"] for r in whole], rtol=1e-4)


def test_is_pipeline(capsys, rows, defaults):
    assert stages.is_pipeline(pipeline(rows, defaults, sft=sft(rows)))
    (rows / "one.yaml").write_text("model: {path: x}\n")
    assert not stages.is_pipeline(Path(rows / "one.yaml"))
    code, _, err = jaxft(capsys, "run", rows / "one.yaml")
    assert code == 2 and "one.yaml: expected a pipeline, with `stages:`" in err
