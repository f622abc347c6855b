"""PPO from the command line: a value model on the policy's base or of its own, written, begun from, and exact."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import jaxft
from jaxft import config as config_
from jaxft.cli import assemble, single
from jaxft.core import tree
from tests.cli.commands import jaxft as run_
from tests.cli.commands import metrics

ROOT = Path(__file__).resolve().parents[2]
REWARD = """
def even(prompts, completions, completion_ids):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture
def words(tiny, tmp_path):
    """Rollouts of 8 completions of 6 tokens, each taken twice."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": [{"role": "user", "content": f"Say {i}"}]}) + "\n" for i in range(6))
    )
    (tmp_path / "reward.py").write_text(REWARD)
    return [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'rows.jsonl'}",
        "data.max_length=48", "objective.name=ppo", "objective.kl_target=0.5", "objective.kl_horizon=20",
        f"rewards=[{{function: '{tmp_path / 'reward.py'}:even'}}]", "rollout.prompts=4", "rollout.samples=2",
        "train.batch=8", "rollout.epochs=2", "rollout.max_new_tokens=6", "peft.rank=4", "optim.lr=0.01",
        "optim.schedule=constant", "optim.warmup_steps=0", "train.steps=4", "checkpoint.every=1", "train.remat=none",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def begun(words, *more):
    config = config_.load(None, [*words[1:], *more])
    base = assemble.model(config, None)
    return single.begin(config, base, 4, None, Console(quiet=True), {}), base.params


def test_the_value_model_is_more_adapters_on_the_very_same_base(words):
    """Layer by layer too, as a GPU holds them."""
    for how in ("train.unroll=never", "train.unroll=always"):
        run, base = begun(words, how)
        critic = run.frozen["critic"]
        ours = {id(a) for a in jax.tree.leaves(terms_of(run.frozen))}
        shared = [a for path, a in tree.arrays(critic) if a.ndim > 1 and "score" not in path]
        assert len(shared) >= 8 and all(id(a) in ours for a in shared)
        apart = tree.arrays(run.first.trainable["critic"])
        assert {path.rsplit("/", 1)[-1] for path, _ in apart} == {"a", "b", "value"}
        assert not np.any(np.asarray(dict(apart)["score/value"]))
        # no second copy of anything big: what trains, its start and its moments are all that a run adds
        assert all(a.size < base["embed"]["tokens"].size / 4 for _, a in tree.arrays(run.first.trainable))
        assert "critic" not in (run.first.start or {"critic"})
        del run


def terms_of(frozen):
    return {name: part for name, part in frozen.items() if name != "critic"}


def test_it_trains_both_and_goes_on_exactly_and_another_begins_with_its_value_model(capsys, words, tmp_path):
    """Killed by the system in the middle of a rollout's minibatches, with a weight of the divergence that adapts."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = run_(capsys, *words, "value.save=true", f"run_dir={whole}")
    assert code == 0, err
    rows = [row for row in metrics(whole) if "loss/value" in row]
    assert len(rows) == 4 and all(row["grad_norm"] > 0 for row in rows)
    coefficients = [row["objective/kl_coef"] for row in rows if "objective/kl_coef" in row]
    assert len(coefficients) == 2 and coefficients[0] == pytest.approx(0.05) and coefficients[1] < coefficients[0]
    # the head of zeros said 0 of every state of the first rollout, and not of the second
    assert rows[0]["loss/value_avg"] > rows[2]["loss/value_avg"] > 0

    flags = os.environ["XLA_FLAGS"] + " --xla_cpu_use_fusion_emitters=false" * (jax.__version_info__ < (0, 11))
    kill = tmp_path / "kill.py"
    kill.write_text(
        "import os, signal, sys, threading, time\nfrom pathlib import Path\nfrom jaxft import cli\n"
        f"file = Path({str(killed / 'metrics.jsonl')!r})\n"
        "def watch():\n"
        "    while not (file.exists() and file.read_text().count('grad_norm') >= 3):\n        time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=watch, daemon=True).start()\ncli.main(sys.argv[1:])\n"
    )
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(kill), *words, "value.save=true", f"run_dir={killed}"]
    child = subprocess.run(command, env=env, capture_output=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert run_(capsys, *words, "value.save=true", f"run_dir={killed}", "--resume")[0] == 0
    timeless = [[{k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k}
                 for row in metrics(folder)] for folder in (whole, killed)]  # fmt: skip
    assert timeless[0] == timeless[1]
    for name in ("adapter", "value"):
        one, other = (load_file(folder / name / "adapter_model.safetensors") for folder in (whole, killed))
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)

    policy = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert not any("score" in name or "critic" in name for name in policy)
    saved = load_file(whole / "value" / "adapter_model.safetensors")
    run, _ = begun(words, f"value.path={whole / 'value'}")
    critic = run.first.trainable["critic"]
    head = next(value for name, value in saved.items() if "score" in name)
    np.testing.assert_array_equal(np.asarray(critic["score"].value).ravel(), head.ravel())
    assert np.any(head) and {id(a) for a in jax.tree.leaves(run.frozen["critic"]["layers"]) if a.ndim > 2} <= {
        id(a) for a in jax.tree.leaves(run.frozen["layers"])
    }


def test_a_value_model_of_its_own_begins_from_a_reward_model(capsys, words, tiny, tmp_path):
    """Whole, with that one's head; written as what transformers loads."""
    import torch
    from transformers import AutoModelForSequenceClassification as Auto

    base = jaxft.load(str(tiny), "float32")
    judge = jaxft.reward_model(base, jax.random.key(0))
    jaxft.save_hf(judge, judge.params, tmp_path / "judge")
    more = [f"value.path={tmp_path / 'judge'}", "value.save=true", "train.steps=1", "peft={method: lora, rank: 4}"]
    run, params = begun(words, *more)
    np.testing.assert_array_equal(run.first.trainable["critic"]["score"], judge.params["score"])
    assert run.first.trainable["critic"]["layers"]["attn"]["q"].shape == params["layers"]["attn"]["q"].shape
    code, _, err = run_(capsys, *words, *more)
    assert code == 0, err
    made = Auto.from_pretrained(tmp_path / "run" / "value")
    was = Auto.from_pretrained(tmp_path / "judge")
    moved = (made.score.weight - was.score.weight).detach().abs().max()
    assert 0 < float(moved) < 0.1 and torch.isfinite(made.score.weight).all()


@pytest.mark.parametrize("more, told", [
    (["objective=grpo", "value.save=true"], "`value.save`: objective grpo has no value model"),
    (["value.revision=main"], "`value.revision`: says something of a model of its own"),
    (["optim.l2_start=0.1"], "`optim.l2_start`: beside a value model"),
    (["value.peft={method: prompt_tuning, tokens: 3}"], "a learnt prompt of 3 positions where"),
    (["value.peft={method: adalora}"], "`value.peft`: its method changes itself in every step"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(capsys, words, more, told):
    if more[0] == "objective=grpo":
        words = [word for word in words if not word.startswith("objective")]
    code, _, err = run_(capsys, *words, *more)
    assert code and told in err, err
