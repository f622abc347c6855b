"""`jaxft compare`: sizes match, runs are kept, failures are told, the table says what was measured."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import jax
import pytest

from jaxft import config, peft, recipes, run_dir
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
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    monkeypatch.setenv("XLA_FLAGS", flags)  # one device, and not optimised: less to compile
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
    names = compare._methods(None)
    assert set(peft.METHODS) - set(names) == {"adapter", "trainable_tokens"}
    entries = compare.methods(
        config.load(recipes.find("quickstart"), [f"model.path={ASSETS / 'tiny'}"]), names, 196_608
    )
    assert [(entry.name, entry.problem) for entry in entries if entry.problem] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "lora,lokii"], "--methods: got 'lokii'"),
        (["--methods", "lora,lora"], "--methods: got lora more than once"),
        (["--methods", "no.py:Mine"], "--methods: no file"),
        (["--budget", "0"], "--budget: got 0; expected at least 1"),
        (["--budget", "-5"], "--budget: got -5"),
        (["--jobs", "0"], "--jobs: got 0"),
        (["--limit", "-1"], "--limit: got -1"),
        (["--shots", "-1"], "--shots: got -1"),
        (["--seeds", "a"], "--seeds: got 'a'; expected integers"),
        (["--seeds", "0,0"], "--seeds: got 0 more than once"),
        (["--lr-factors", "x"], "--lr-factors: got 'x'; expected numbers"),
        (["--lr-factors", "1,0"], "--lr-factors: got 1,0; expected positive numbers"),
        (["data.eval_path=null"], "give data.eval_path=FILE"),
    ],
)
def test_refusals(capsys, tmp_path, words, said):
    out = ["--out", tmp_path / "out"]
    code, _, err = jaxft(capsys, "compare", recipes.find("quickstart"), *words, *out)
    assert code == 2 and said in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


def test_a_table_is_of_one_limit_and_budget(capsys, tmp_path, monkeypatch):
    """Learning rates that are near to each other are runs of their own."""
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: CompletedProcess(a, 1, stdout=""))
    quickstart = recipes.find("quickstart")
    words = ["compare", quickstart, f"model.path={ASSETS / 'tiny'}", "--methods", "ia3", "--out", tmp_path / "out"]
    assert jaxft(capsys, *words, "--lr-factors", "1,1.01")[0] == 1
    assert len([log for log in (tmp_path / "out" / "ia3").iterdir() if log.name.startswith("seed0-")]) == 2
    assert jaxft(capsys, *words, "--seeds", "0")[0] == 1
    for other in (["--limit", "3"], ["--budget", "5000"]):
        code, _, err = jaxft(capsys, *words, *other)
        assert code == 2 and "other settings" in err and "asked.json" in err, err
    with run_dir.held(tmp_path / "out"):
        code, _, err = jaxft(capsys, *words)
    assert code == 2 and "is writing here" in err


def test_a_method_of_ones_own(tmp_path, monkeypatch):
    """Named by its file or as an installed package offers it, and sized by its rank."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom jaxft.peft import LoRA, Targeted\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Targeted):\n    rank: int = 2\n\n"
        "    def wrap(self, site):\n        return LoRA(rank=self.rank, alpha=1).wrap(site)\n"
    )
    monkeypatch.chdir(tmp_path)
    named = compare._methods("ia3,mine.py:Mine")
    settings = config.load(recipes.find("quickstart"), [f"model.path={ASSETS / 'tiny'}", "peft=ia3"])
    ia3, mine = compare.methods(settings, named, 200_000)
    assert (mine.name, mine.problem, ia3.problem) == ("Mine", "", "") and mine.settings is not None
    assert mine.settings["module"] == f"{tmp_path}/mine.py:Mine" and abs(mine.parameters - 200_000) < 50_000
    monkeypatch.setattr(compare.registry, "installed", lambda: {"mine": named[f"{tmp_path}/mine.py:Mine"]})
    (entry,) = compare.methods(settings, compare._methods("mine"), 200_000)
    assert entry.settings and entry.settings["method"] == "mine" and entry.parameters == mine.parameters


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child of its parent's end")
def test_a_child_ends_with_its_parent():
    """It waits for its standard input, which stays open, as does its output until it has ended."""
    start = "import subprocess; from jaxft.cli import child; subprocess.run(child.command(['generate', 'x']))"
    kept, given = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", start], stdin=kept, stdout=subprocess.PIPE)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not children.read_text():
        time.sleep(0.01)
    parent.kill()
    parent.communicate(timeout=60)
    os.close(kept)
    os.close(given)
