"""Prompts and prefixes from the command line: trained on packed rows, resumed, evaluated, spoken with, exported."""

import json

import pytest
from safetensors.numpy import load_file

from tests.cli.test_train import jaxft, metrics, torch_logits, words  # noqa: F401

SHORT = ("peft.tokens=4", "eval.samples=1")


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_slot_from_config_to_peft(capsys, words, tiny, tmp_path, method):  # noqa: F811
    run = tmp_path / "run"
    code, out, err = jaxft(capsys, *words, *SHORT, f"peft.method={method}", "optim.lr=0.1")
    assert code == 0, err
    assert f"with {method}" in out and "jaxft merge" not in out
    losses = [row["loss"] for row in metrics(run) if "loss" in row]
    assert losses[-1] < losses[0]
    moved = torch_logits(tiny, run / "adapter")[:, -20:] - torch_logits(tiny)
    assert abs(moved).max() > 1e-2

    code, out, err = jaxft(capsys, "eval", run, "--json", "--limit", "1")
    assert code == 0, err
    last = [row for row in metrics(run) if "eval_loss" in row][-1]
    assert json.loads(out)["loss"] == pytest.approx(last["eval_loss"], abs=1e-5)

    code, out, err = jaxft(capsys, "generate", run, "--prompt", "Say hi", "generate.max_new_tokens=4")
    assert code == 0, err
    code, _, err = jaxft(capsys, "merge", run, "--out", tmp_path / "merged")
    assert code == 1 and method.split("_")[0] in err and "cannot be merged" in err


def test_p_tuning_goes_on_where_it_was(capsys, words, tmp_path):  # noqa: F811
    """The encoder is in the state: two steps and two more are four, to the bit, with dropout between its layers."""
    more = ["peft.method=p_tuning", "peft.encoder=lstm", "peft.hidden=8", "peft.dropout=0.2", "peft.tokens=4",
            "optim.schedule=constant", "eval.samples=0", "checkpoint.every=2"]  # fmt: skip
    for name, steps in (("whole", (4,)), ("halves", (2, 4))):
        for i, count in enumerate(steps):
            extra = [f"run_dir={tmp_path / name}", f"train.steps={count}", *(["--resume"] if i else [])]
            code, _, err = jaxft(capsys, *words, *more, *extra)
            assert code == 0, err
    held = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "halves")]
    (key,) = held[0]
    assert key == "prompt_embeddings" and (held[0][key] == held[1][key]).all()
    first = [[row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("whole", "halves")]
    assert first[0] == first[1] and len(first[0]) == 4


def test_tasks_come_from_a_column(capsys, words, tmp_path):  # noqa: F811
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for name in ("train", "held_out"):
        lines = (json.dumps({**row, "kind": i % 2}) + "\n" for i, row in enumerate(rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    more = ["data.task_column=kind", "peft.method=multitask_prompt_tuning", *SHORT]
    code, _, err = jaxft(capsys, *words, *more)
    assert code == 1 and "the data have a task 1; the model has a prompt for 1" in err
    code, _, err = jaxft(capsys, *words, *more, "peft.tasks=2", "optim.lr=0.1")
    assert code == 0, err
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0]
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")["prefix_task_cols"].shape == (2, 4, 1)
