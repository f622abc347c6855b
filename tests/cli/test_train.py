"""jaxft train from the command line to files that transformers and peft load."""

import json

import pytest

from jaxft import cli, config
from tests.cli.commands import jaxft, metrics

CHATS = [("Sort: 3 1 2", "1 2 3"), ("Spell dog", "d o g"), ("Say hi", "hi"), ("Add 2 and 3", "5")]


@pytest.fixture
def words(tiny, tmp_path):
    """A short run: four chats, two of them held out."""
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in lines))
    return [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'train.jsonl'}",
        f"data.eval_path={tmp_path / 'held_out.jsonl'}", "data.max_length=64", "train.batch=8", "train.steps=4",
        "optim.lr=0.01", "eval.samples=2", "generate.max_new_tokens=8", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def torch_logits(folder, adapter=None):
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def test_lora_from_config_to_peft(capsys, words, tiny, tmp_path):
    run = tmp_path / "run"
    code, out, err = jaxft(capsys, *words)
    assert code == 0, err
    assert "perplexity" in out and "the same prompts" in out and f"jaxft chat {run}" in out
    losses = [row["loss"] for row in metrics(run) if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "adapter"} <= {
        p.name for p in run.iterdir()
    }
    moved = abs(torch_logits(tiny, run / "adapter") - torch_logits(tiny)).max()
    assert moved > 1e-2

    code, _, err = jaxft(capsys, *words)
    assert code == 2 and "holds a run; go on with it (--resume" in err

    code, _, err = jaxft(capsys, "merge", run, "--out", tmp_path / "merged")
    assert code == 0, err
    assert abs(torch_logits(tmp_path / "merged") - torch_logits(tiny, run / "adapter")).max() < 1e-4

    code, out, err = jaxft(capsys, "eval", run, "--json", "--limit", "0")
    assert code == 0, err
    last = [row for row in metrics(run) if "eval_loss" in row][-1]
    assert json.loads(out)["loss"] == pytest.approx(last["eval_loss"], abs=1e-5)


def test_full_fine_tuning_writes_a_model_and_resumes(capsys, words, tiny, tmp_path):
    run = tmp_path / "run"
    code, _, err = jaxft(capsys, *words, "peft=full", "checkpoint.every=2", "eval.samples=0")
    assert code == 0, err
    first = torch_logits(run / "model")
    assert abs(first - torch_logits(tiny)).max() > 1e-2
    code, _, err = jaxft(
        capsys,
        *words,
        "peft=full",
        "checkpoint.every=2",
        "eval.samples=0",
        "train.steps=6",
        "optim.offload=true",
        "--resume",
    )
    assert code == 0, err
    assert [row["step"] for row in metrics(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert abs(torch_logits(run / "model") - first).max() > 0


def test_refusals_come_before_any_work(capsys, words, tmp_path):
    for extra, said in (
        (["optim.lrr=1"], "did you mean `optim.lr`?"),
        (["peft.targets=[q_prj]"], "q_prj"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["model.path=/nowhere"], "/nowhere"),
        (["train.epochs=1"], "expected one of the two"),
    ):
        code, _, err = jaxft(capsys, *words, *extra)
        assert code in (1, 2) and said in err and "Traceback" not in err, (extra, err)
        assert not (tmp_path / "run").exists(), extra


def test_dry_run_prints_the_resolved_config(capsys, words, tmp_path):
    code, out, _ = jaxft(capsys, *words, "--dry-run")
    (tmp_path / "again.yaml").write_text(out)
    assert code == 0 and not (tmp_path / "run").exists()
    assert config.load(tmp_path / "again.yaml") == config.load(None, words[1:])


def test_help_shows_every_key_and_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(
        key in out for key in ("model.path", "data.max_length", "optim.lr", "peft.rank", "train.batch", "mesh.fsdp")
    )
    assert "required" in out and "Peak learning rate" in out


def test_unrolled_layers_give_the_scanned_run(capsys, words, tmp_path):
    runs = []
    for how in ("never", "always"):
        code, _, err = jaxft(capsys, *words, f"train.unroll={how}", f"run_dir={tmp_path / how}", "train.remat=save")
        assert code == 0, err
        runs.append([row["loss"] for row in metrics(tmp_path / how) if "loss" in row])
        assert (tmp_path / how / "adapter" / "adapter_model.safetensors").exists()
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_a_metric_that_is_not_evaluated_is_refused_before_training(capsys, words, tmp_path):
    code, _, err = jaxft(capsys, *words, "eval.metric=foo")
    assert code == 2 and "eval.metric" in err and "perplexity" in err
    assert not (tmp_path / "run").exists()


def test_factors_that_begin_from_data(capsys, words, tiny, tmp_path):
    """Measured on the training batches before the first step, and the same when the run goes on."""
    run = tmp_path / "run"
    settings = [
        "peft.init=eva",
        "peft.rank=4",
        "peft.targets=[q_proj,down_proj]",
        "checkpoint.every=2",
        "eval.samples=0",
    ]
    code, _, err = jaxft(capsys, *words, *settings, "train.steps=2")
    assert code == 0, err
    code, _, err = jaxft(capsys, *words, *settings, "--resume")
    assert code == 0, err
    losses = [row["loss"] for row in metrics(run) if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert written["rank_pattern"], "ranks have moved between layers"
    assert abs(torch_logits(tiny, run / "adapter") - torch_logits(tiny)).max() > 1e-2


METHOD = """
from dataclasses import dataclass
import jax.numpy as jnp
from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft import Targeted

@dataclass(frozen=True)
class Curved(Targeted):
    def wrap(self, site):
        return CurvedWeight(site.base, jnp.zeros((*site.layers.shape, site.shape[1])), site.gate)

@weight
class CurvedWeight(Weight):
    base: object = parameter()
    by: object = trainable()
    gate: object
    f: object = static(default=jnp.tanh)

    def __rmatmul__(self, x):
        return x @ self.base + self.f(self.gate * self.by).astype(x.dtype)
"""


def test_what_could_not_be_saved_is_not_trained(capsys, words, tmp_path):
    (tmp_path / "curved.py").write_text(METHOD)
    code, _, err = jaxft(capsys, *words, f"peft.module={tmp_path / 'curved.py'}:Curved")
    assert code == 1
    assert "layers/attn/k/f: got a PjitFunction; expected static fields of numbers" in err and "keep its name" in err
    assert not (tmp_path / "run").exists()


def test_held_out_rows_may_be_written_in_another_way(capsys, words, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in CHATS))
    code, _, err = jaxft(capsys, *words, "eval.exact_match=2")
    assert code == 0, err
    assert metrics(tmp_path / "run")[-1]["eval_exact_match"] == 0
