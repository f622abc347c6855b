"""`jaxft compare`: sizes match, runs are kept, failures are told, the table says what was measured."""

import json
from subprocess import CompletedProcess

import jax
import pytest

from jaxft import config, peft, recipes
from jaxft.cli import compare
from jaxft.peft import budget
from tests.cli.conftest import ASSETS
from tests.cli.test_train import jaxft
from tests.peft import pairs


def test_sizes_match_the_budget():
    model = pairs.ours("llama")
    config, found = budget.fit(model, "lora", peft.LoRA(), 4000)
    exact = budget.count(model, config)
    assert found == exact and config.rank == 3
    params, mask, _ = peft.adapt_for_training(model, jax.random.key(0), [config])
    assert sum(p.size for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True) if m) == exact
    assert set(budget.SIZED_BY) <= set(peft.METHODS)
    for name, field in budget.SIZED_BY.items():
        assert hasattr(peft.METHODS[name].config(), field), (name, field)


def test_runs_are_made_once_and_told(capsys, tiny, tmp_path, monkeypatch):
    """Each run is a process of its own; asked for again, nothing is run; a failure is told."""
    monkeypatch.setenv("XLA_FLAGS", "")  # one device: less to compile
    lines = [json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
             for q, a in (("Sort: 3 1 2", "1 2 3"), ("Spell dog", "d o g"))]  # fmt: skip
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    words = [
        f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'train.jsonl'}",
        f"data.eval_path={tmp_path / 'held_out.jsonl'}", "data.max_length=64", "train.batch=8", "train.steps=2",
        "optim.lr=0.01", "eval.samples=0", "generate.max_new_tokens=4",
    ]  # fmt: skip
    out = tmp_path / "compare"
    options = "--methods lora,full --seeds 0 --budget 6000 --limit 2 --shots 1 --out".split()
    options.append(out)
    code, said, err = jaxft(capsys, "compare", *words, *options)
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())}
    assert set(rows) == {"prompt", "1-shot prompt", "lora", "full"}
    assert rows["lora"]["lr"] == pytest.approx(0.01) and rows["full"]["lr"] == pytest.approx(0.001)
    assert abs(rows["lora"]["parameters"] - 6000) < 2000 and rows["lora"]["settings"]["rank"] < 8
    assert rows["lora"]["runs"][0]["loss"] < rows["prompt"]["runs"][0]["loss"]
    assert "| lora | 0.0 % |" in (out / "table.md").read_text()

    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: pytest.fail("a finished run is run again"))
    assert jaxft(capsys, "compare", *words, *options)[0] == 0

    code, _, err = jaxft(capsys, "compare", *words, "train.steps=3", *options)
    assert code == 2 and "other settings" in err

    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: CompletedProcess(a, 1, stdout=""))
    code, said, _ = jaxft(capsys, "compare", *words, *options[:-1], tmp_path / "other")
    assert code == 1 and "exit code 1, see" in said


def test_all_methods_are_those_that_need_no_setting():
    """By default every method is compared but those that must be told a path or tokens."""
    names = compare._names(None)
    assert set(peft.METHODS) - set(names) == {"adapter", "trainable_tokens"}
    entries = compare.methods(
        config.load(recipes.find("quickstart"), [f"model.path={ASSETS / 'tiny'}"]), names, 196_608
    )
    assert [(entry.name, entry.problem) for entry in entries if entry.problem] == []


def test_unknown_methods_are_refused(capsys, tiny):
    code, _, err = jaxft(capsys, "compare", f"model.path={tiny}", "--methods", "lora,lokii")
    assert code == 2 and "lokii" in err
