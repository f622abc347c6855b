"""Objectives of data on what the policy writes: a student's own completions, and pairs that are judged as they come."""

import json
import math
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxft.cli import samples
from jaxft.rollout import source as source_
from tests.cli.commands import jaxft, metrics
from tests.cli.test_rollouts import REWARD, ROOT, ask


@pytest.fixture
def words(tiny, tmp_path):
    """Six chats, to learn or to answer anew: rollouts of 8 prompts, and steps of 8 rows."""
    chats = [[*ask(f"Say {i}"), {"role": "assistant", "content": f"{i} {i + 1}"}] for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "reward.py").write_text(REWARD)
    return [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'rows.jsonl'}",
        "data.max_length=64", "train.batch=8", "optim.lr=0.01", "optim.schedule=constant", "optim.warmup_steps=0",
        "checkpoint.every=1", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


@pytest.fixture
def student(words, tiny):
    """... a distillation from the same model as it is, with a student that a seed has put elsewhere."""
    return [
        *words, "objective={name: distil, divergence: jsd}", f"teacher.path={tiny}", "model.init=random",
        "peft=full", "optim.lr=0.003", "rollout.prompts=8", "rollout.samples=2", "rollout.max_new_tokens=8",
    ]  # fmt: skip


@pytest.fixture
def judged(words, tmp_path):
    """... pairs of four completions, by the share of even tokens in them."""
    even = f"rewards=[{{function: '{tmp_path / 'reward.py'}:even'}}]"
    return [
        *words, "objective=dpo", even, "rollout.prompts=8", "rollout.samples=4", "rollout.max_new_tokens=8",
    ]  # fmt: skip


def losses(run):
    return [row["loss"] for row in metrics(run) if "loss" in row]


def test_a_student_learns_from_its_own_completions(capsys, student, tmp_path):
    watched = f"rewards=[{{function: '{tmp_path / 'reward.py'}:even', weight: 0}}]"
    code, out, err = jaxft(capsys, *student, watched, "train.steps=8", "optim.lr=0.01", "checkpoint.every=null")
    assert code == 0, err
    assert "a rollout: 8 prompts x 2 completions" in out
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert {row["on_policy"] for row in rows} == {1} and rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert ["rewards/even/mean" in row for row in rows[:4]] == [True, False, True, False]
    assert rows[0]["completions/max_length"] <= 8
    table = samples.read(tmp_path / "run")
    assert len(table) == 4 * 16 and "advantage" not in table[0]
    code, out, err = jaxft(capsys, "samples", tmp_path / "run")
    assert code == 0 and "the rollout of step 7" in out, err


def test_without_its_own_it_is_the_distillation_of_the_data(capsys, student, tmp_path):
    offline = [word for word in student if not word.startswith("rollout.")]
    assert jaxft(capsys, *student, "rollout.fraction=0", "train.steps=4")[0] == 0
    assert jaxft(capsys, *offline, "train.steps=4", f"run_dir={tmp_path / 'offline'}")[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "offline")
    assert {row["on_policy"] for row in metrics(tmp_path / "run") if "loss" in row} == {0}


def test_a_mixture_of_both_goes_on_exactly(capsys, student, tmp_path):
    """Killed by the system behind a step of the student's and a batch of the data's, in the middle of a rollout."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [*student, "rollout.fraction=0.5", "train.steps=6", "rollout.seed=1", "rollout.samples=4",
             f"rewards=[{{function: '{tmp_path / 'reward.py'}:even', weight: 0, on_error: stop}}]"]  # fmt: skip
    assert jaxft(capsys, *words, f"run_dir={whole}")[0] == 0
    drawn = [row["on_policy"] for row in metrics(whole) if "loss" in row]
    assert drawn[:4] == [1 - drawn[4]] * 4 and drawn[4:] == [drawn[4]] * 2

    flags = os.environ["XLA_FLAGS"] + " --xla_cpu_use_fusion_emitters=false" * (jax.__version_info__ < (0, 11))
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest", "KILLED_AFTER": "2",
           "RUN": str(killed), "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-m", "jaxft", *words, f"run_dir={killed}"]
    child = subprocess.run(command, env=env, capture_output=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert jaxft(capsys, *words, f"run_dir={killed}", "--resume")[0] == 0
    assert losses(whole) == losses(killed)
    assert samples.read(whole) == samples.read(killed)


def test_the_best_and_the_worst_of_a_prompt_are_a_pair(capsys, judged, tmp_path, monkeypatch):
    seen = []
    make = source_.Source.next
    monkeypatch.setattr(source_.Source, "next", lambda *given: seen.append(make(*given)) or seen[-1])
    code, out, err = jaxft(capsys, *judged, "train.steps=3", "rollout.epochs=3", "checkpoint.every=null")
    assert code == 0, err
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["loss"] > rows[1]["loss"] > rows[2]["loss"] and rows[2]["rewards/margins"] > 0
    assert ["reward" in row for row in rows] == [True, False, False]
    assert 0 < rows[0]["pairs/ratio"] <= 1
    table = [row for row in samples.read(tmp_path / "run") if row["step"] == 1]
    for group in (table[i : i + 4] for i in range(0, 32, 4)):
        reward = {row["pair"]: row["reward"] for row in group if row["pair"]}
        every = [row["reward"] for row in group]
        assert reward == ({"chosen": max(every), "rejected": min(every)} if max(every) > min(every) else {})
    # what the step saw is what the table tells of
    batch, _ = seen[0]
    keep = batch["sequence_mask"][:, 0]
    lengths = [[int((batch["loss_mask"][i] & (batch["segments"][i] == s)).sum()) for s in (1, 2)]
               for i in np.flatnonzero(keep)]  # fmt: skip
    told = [row["tokens"] for row in table if row["pair"] == "chosen"]
    assert sorted(chosen for chosen, _ in lengths) == sorted(told)
    code, out, err = jaxft(capsys, "samples", tmp_path / "run")
    assert code == 0 and "rejected" in out, err


@pytest.mark.parametrize("more, told", [
    (["rewards=[]"], "`rewards` must be given"),
    (["rollout.samples=1"], "`rollout.samples`: got 1"),
    (["train.batch=16"], "8 prompts x a pair of 4 samples are 8 pairs; expected a multiple of the 16 rows"),
    (["reference.precompute=true"], "`reference.precompute`: what a policy will write"),
    (["rollout.fraction=0.5"], "`rollout.fraction`"),
    (["objective=kto"], "objective kto learns from data and not from rollouts"),
    (["objective=reward"], "objective reward learns from data and not from rollouts"),
])  # fmt: skip
def test_pairs_that_cannot_be_are_refused(capsys, judged, more, told):
    code, _, err = jaxft(capsys, *judged, *more)
    assert code and told in err, err


@pytest.mark.parametrize("more, told", [
    (["objective.teacher=stored"], "`objective.teacher`: got stored"),
    (["objective.divergence=uld"], "`objective.divergence`: got uld"),
    (["rollout.fraction=1.5"], "rollout.fraction: got 1.5"),
    (["rollout.dynamic=true"], "`rollout.dynamic`"),
    (["rollout.samples=3", "rollout.prompts=1"], "expected a multiple of the 8 rows"),
    (["data.max_length=8"], "`data.max_length`"),
    (["objective.teacher=ema"], "`teacher.path`: with objective.teacher=ema"),
    (["objective.teacher=ema", "teacher.path=null"], "`objective.ce_weight`: got 0"),
    (["objective.ema=0.5"], "objective.ema: got 0.5 with teacher=live"),
])  # fmt: skip
def test_students_that_cannot_be_are_refused(capsys, student, more, told):
    code, _, err = jaxft(capsys, *student, *more)
    assert code and told in err, err
