"""jaxft train on what the policy writes: it learns, it goes on exactly, and it refuses what does not fit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft.cli import samples
from tests.cli.commands import jaxft, metrics

ROOT = Path(__file__).resolve().parents[2]
REWARD = '''
import json, os, signal, threading, time
from pathlib import Path

calls = 0

def even(prompts, completions, completion_ids, log_extra, **columns):
    """The share of tokens with an even number."""
    global calls
    calls += 1
    if "FAILS" in os.environ:
        raise KeyError("gone")
    if calls == 1 and "KILLED_AFTER" in os.environ:
        threading.Thread(target=kill, daemon=True).start()
    log_extra("first", [ids[0] for ids in completion_ids])
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

def kill():
    while True:
        file = Path(os.environ["RUN"], "metrics.jsonl")
        if file.exists() and file.read_text().count("grad_norm") >= int(os.environ["KILLED_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)

def asked(prompts, completions, answer):
    return [float(text.strip() == a) for text, a in zip(completions, answer)]
'''


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def words(tiny, tmp_path):
    """Rollouts of 4 prompts x 4 completions of 8 tokens, two steps each; two prompts are held out."""
    rows = [{"prompt": ask(f"Say {i}"), "answer": str(i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    return [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'rows.jsonl'}",
        "data.eval_examples=2", "data.max_length=64", "objective=grpo", "train.batch=8", "train.steps=5",
        f"rewards=[{{function: '{tmp_path / 'reward.py'}:even', on_error: stop}}]",
        "rollout.prompts=4", "rollout.samples=4", "rollout.max_new_tokens=8", "optim.lr=0.01",
        "optim.schedule=constant", "optim.warmup_steps=0", "generate.max_new_tokens=8", "checkpoint.every=1",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def result(run):
    """What a run leaves that must not depend on how often it was interrupted."""
    rows = [{k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k}
            for row in metrics(run)]  # fmt: skip
    return rows, samples.read(run), load_file(run / "adapter" / "adapter_model.safetensors")


def same(one, other):
    (rows, said, arrays), (rows_2, said_2, arrays_2) = result(one), result(other)
    assert rows == rows_2 and said == said_2
    assert arrays.keys() == arrays_2.keys() and all(np.array_equal(arrays[n], arrays_2[n]) for n in arrays)


def test_it_learns_what_is_rewarded(capsys, words, tmp_path):
    run = tmp_path / "run"
    more = ["train.steps=48", "optim.lr=0.005", "peft=full", "rollout.max_new_tokens=4", "eval.every=100",
            "eval.at_start=true", "checkpoint.every=null"]  # fmt: skip
    code, out, err = jaxft(capsys, *words, *more)
    assert code == 0, err
    assert "6 prompts of" in out and "2 held out; columns: answer" in out
    rows = metrics(run)
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert len(rewards) == 24 and rewards[-1] > rewards[0] + 0.2
    held = [row["eval_reward"] for row in rows if "eval_reward" in row]
    assert held[-1] > held[0] + 0.2
    first = next(row for row in rows if "reward" in row)
    assert {"rewards/even/mean", "rewards/even/std", "completions/mean_length", "time/rollout", "reward_std"} <= set(
        first
    )
    # the sampler and the trainer agree on the same weights, to float32 rounding
    assert 0 < first["sampling/sampling_logp_difference/max"] < 1e-4

    code, out, err = jaxft(capsys, "eval", run, "--json")
    assert code == 0 and json.loads(out)["reward"] == pytest.approx(held[-1], abs=1e-6), err

    code, out, err = jaxft(capsys, "samples", run, "--json", "--step", 6, "--limit", 5)
    table = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(table) == 5 and {row["step"] for row in table} == {5}
    assert len({row["prompt"] for row in table[:4]}) == 1 and table[0]["first"] >= 0
    group = [row for row in samples.read(run) if row["step"] == 5][:4]
    assert abs(sum(row["advantage"] for row in group)) < 1e-4
    assert sorted(group, key=lambda r: r["advantage"]) == sorted(group, key=lambda r: r["reward"])
    code, out, err = jaxft(capsys, "samples", run)
    assert code == 0 and "the rollout of step 47" in out and "advantage" in out


def test_it_goes_on_exactly(capsys, words, tmp_path, monkeypatch):
    """Ended in the middle of a rollout's minibatches, then by a reward in the middle of making one; and killed by the
    system in the middle of its minibatches: the same run as one that was never interrupted."""
    whole, halves, killed = tmp_path / "whole", tmp_path / "halves", tmp_path / "killed"
    assert jaxft(capsys, *words, f"run_dir={whole}")[0] == 0

    assert jaxft(capsys, *words, "train.steps=3", f"run_dir={halves}")[0] == 0
    monkeypatch.setenv("FAILS", "1")
    code, _, err = jaxft(capsys, *words, f"run_dir={halves}", "--resume")
    assert code == 1 and "gone" in err and [row["step"] for row in metrics(halves)][-1] == 4
    monkeypatch.delenv("FAILS")
    assert jaxft(capsys, *words, f"run_dir={halves}", "--resume")[0] == 0
    rows, said, arrays = result(whole)
    again, said_2, arrays_2 = result(halves)
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in again if "loss" in row]
    assert said == said_2 and all(np.array_equal(arrays[name], arrays_2[name]) for name in arrays)

    flags = os.environ["XLA_FLAGS"] + " --xla_cpu_use_fusion_emitters=false" * (jax.__version_info__ < (0, 11))
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest", "KILLED_AFTER": "3",
           "RUN": str(killed), "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-m", "jaxft", *words, f"run_dir={killed}"]
    child = subprocess.run(command, env=env, capture_output=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert jaxft(capsys, *words, f"run_dir={killed}", "--resume")[0] == 0
    same(whole, killed)


def test_an_answer_of_the_data_is_a_column_and_exact_match(capsys, words, tmp_path):
    """A table reward and one of one's own by the answer; layers apart, as on a GPU; no sample is logged."""
    own = f"{{function: '{tmp_path / 'reward.py'}:asked', weight: 0.5}}"
    more = [f"rewards=[{{name: exact_match, weight: 2}}, {own}]", "train.steps=1", "eval.exact_match=2"]
    code, _, err = jaxft(capsys, *words, *more, "rollout.log_samples=0", "rollout.dynamic=true", "train.unroll=always")
    assert code == 0, err
    row = metrics(tmp_path / "run")[-1]
    assert {"eval_exact_match", "eval_reward", "eval_rewards/exact_match", "eval_rewards/asked"} <= row.keys()
    assert not (tmp_path / "run" / samples.FILE).exists()
    code, _, err = jaxft(capsys, "samples", tmp_path / "run")
    assert code == 2 and "no samples" in err


def test_jaxft_data_shows_prompts_and_their_columns(capsys, words):
    code, out, err = jaxft(capsys, "data", *words[1:], "--rows", 1)
    assert code == 0, err
    assert "Say" in out and "<|im_start|>assistant" in out and "answer:" in out and "6 prompts of" in out


@pytest.mark.parametrize("more, told", [
    (["rewards=[]"], "`rewards` must be given"),
    (["train.batch=24"], "4 prompts x 4 samples are 16 completions; expected a multiple of the 24 rows"),
    (["rollout.samples=1", "rollout.prompts=16"], "`rollout.samples`: got 1; objective grpo compares"),
    (["rollout.samples=1", "rollout.prompts=16", "objective={name: reinforce, baseline: group}"], "`rollout.samples`"),
    (["rollout.samples=1", "rollout.prompts=16", "objective=reinforce", "rollout.dynamic=true"], "rollout.dynamic"),
    (["objective=sft"], "`rollout`: objective sft learns from data and not from rollouts"),
    (["data.packing=wrapped"], "`data.packing`: got wrapped"),
    (["data.max_length=8"], "`data.max_length`: got 8 for a prompt and its completion"),
    (["reference.precompute=true"], "`reference.precompute`"),
    (["mesh.distributed=true"], "`mesh.distributed`"),
    (["rollout.temperature=0"], "rollout.temperature: got 0.0"),
    (["--sweep", "optim.lr=1e-3,1e-4"], "`sweep`"),
    (["eval.batches=2"], "`eval.batches`"),
    (["rewards=[{name: maths}]"], "did you mean `math`?"),
    (["rewards=[{name: math, wieght: 2}]"], "did you mean `rewards.0.weight`?"),
    (["peft={method: lora, init: eva}"], "`peft.init`"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_read(capsys, words, more, told):
    code, _, err = jaxft(capsys, *words, *more)
    assert code and told in err, err


@pytest.mark.parametrize("more, told", [
    (["eval.metric=perplexity"], "`eval.metric`: got 'perplexity'; this run evaluates reward, rewards/even"),
    (["data.columns={answer: reply}", "eval.exact_match=2"], "`eval.exact_match`"),
    (["data.columns={answer: finished}"], "`finished`: got a column of that name"),
    (["data.max_length=10"], "a prompt of"),
])  # fmt: skip
def test_what_the_data_cannot_give_is_refused(capsys, words, more, told):
    code, _, err = jaxft(capsys, *words, *more)
    assert code and told in err, err
