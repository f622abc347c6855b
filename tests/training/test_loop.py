"""The host loop: every way a run can go on, and end."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint import CheckpointError
from jaxft.checkpoint import state as disk
from jaxft.checkpoint.config import CheckpointConfig
from jaxft.checkpoint.state import Record
from jaxft.core import tree
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.training import evaluate, loop, optim, prefetch, sinks, state, step
from jaxft.training.config import EvalConfig, LogConfig, OptimConfig, TrainConfig
from jaxft.training.finite import NonFiniteError
from jaxft.training.loop import Settings
from tests.training import tiny

ROOT = Path(__file__).resolve().parents[2]
RECORD = Record(config={"optim": {"lr": 0.05}}, base={"checksum": "abc"})
QUIET = LogConfig(progress=False)


@pytest.fixture(scope="module")
def parts():
    """A compiled step and evaluation, shared: (step, eval step, optimizer, trainable, frozen)"""
    trainable, frozen = tiny.parts(jax.random.key(0))
    optimizer = optim.make(OptimConfig(lr=0.05, schedule="constant"), trainable, 12)
    row = OBJECTIVES["sft"]
    run = step.make_step(row, SFT(), tiny.poisoned_score, optimizer)
    return run, step.make_eval_step(row, SFT(), tiny.score), optimizer, trainable, frozen


def fit(parts, folder, loader=None, steps=12, evaluators=(), record=RECORD, train=None, **sections):
    run, _, optimizer, trainable, frozen = parts
    begin = state.create(trainable, optimizer, jax.random.key(1))
    settings = Settings(train=train or TrainConfig(accumulate=2), log=QUIET, **sections)
    return loop.fit(
        run,
        begin,
        frozen,
        loader or tiny.Loader(),
        folder,
        record,
        settings,
        steps=steps,
        evaluators=evaluators,
        averaged=optimizer.averaged,
        epoch_steps=6,
    )


def arrays(result):
    return {p: np.asarray(leaf) for p, leaf in tree.paths((result.state.trainable, result.state.opt_state))}


def equal(a, b):
    a, b = arrays(a), arrays(b)
    return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) for p in a)


def lines(folder, *names):
    return [tuple(row.get(name) for name in ("step", *names)) for row in sinks.read(folder)]


def test_a_run_from_start_to_end(parts, tmp_path):
    result = fit(parts, tmp_path)
    rows = sinks.read(tmp_path)
    assert (result.step, result.reason, result.exit_code) == (12, "complete", 0)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    tokens = [int((tiny.batch(i, 4)["segments"] > 0).sum()) for i in range(12)]
    assert [row["num_tokens"] for row in rows] == list(np.cumsum(tokens))
    assert rows[5]["epoch"] == 1.0 and rows[0]["skipped"] == 0
    assert parts[0]._cache_size() == 1


def test_the_loss_written_is_that_of_its_own_step(parts, tmp_path):
    """Metrics are fetched one step late; they are still written under the right number."""
    fit(parts, tmp_path, steps=4)
    run, _, optimizer, trainable, frozen = parts
    now, loader = state.create(trainable, optimizer, jax.random.key(1)), tiny.Loader()
    for row in sinks.read(tmp_path):
        now, metrics = run(now, frozen, tiny.micro(next(loader), 2))
        assert row["loss"] == float(metrics["loss"])


def test_resuming_is_the_same_run(parts, tmp_path):
    """Six steps, then six more from the checkpoint: bit for bit twelve, and the same metrics."""
    whole = fit(parts, tmp_path / "whole")
    first = fit(parts, tmp_path / "halves", steps=6)
    loader = tiny.Loader()
    both = fit(parts, tmp_path / "halves", loader)
    assert first.step == 6 and both.step == 12
    assert equal(whole, both)
    names = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy")
    assert lines(tmp_path / "whole", *names) == lines(tmp_path / "halves", *names)


def test_a_finished_run_started_again_does_nothing(parts, tmp_path):
    done = fit(parts, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = fit(parts, tmp_path)
    assert (again.step, again.reason) == (12, "complete") and equal(done, again)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_lines_after_the_checkpoint_are_written_anew_not_twice(parts, tmp_path):
    """Killed after step 8 with a checkpoint at 6: lines 7 and 8 (and half a line) are there before the resume."""
    fit(parts, tmp_path, steps=6)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 99}\n{"step": 8, "loss": 99}\n{"step": 9, "lo')
    fit(parts, tmp_path)
    assert [row["step"] for row in sinks.read(tmp_path)] == list(range(1, 13))
    assert all(row["loss"] != 99 for row in sinks.read(tmp_path))


def test_the_cursor_saved_is_of_the_last_batch_consumed(parts, tmp_path):
    """The loader runs ahead; the checkpoint knows only what the steps have eaten."""
    loader = tiny.Loader()
    fit(parts, tmp_path, loader, steps=5, train=TrainConfig(accumulate=2, prefetch=3))
    assert loader.consumed > 5
    with disk.open_folder(tmp_path / "checkpoints") as manager:
        assert disk.read(manager).cursor == {"consumed": 5}


def test_batches_of_the_policy_are_made_for_their_step_and_kept_in_the_checkpoint(parts, tmp_path):
    """Seven steps end in the middle of a draw: what is left of it is saved, and the run that goes on is the same."""
    run, _, optimizer, trainable, frozen = parts

    def on_policy(folder, source, steps):
        begin = state.create(trainable, optimizer, jax.random.key(1))
        settings = Settings(train=TrainConfig(accumulate=2), log=LogConfig(progress=False, every=4))
        how = {"steps": steps, "averaged": optimizer.averaged, "feed": prefetch.as_asked}
        return loop.fit(run, begin, frozen, source, folder, RECORD, settings, **how)

    whole = on_policy(tmp_path / "whole", tiny.Source(), 12)
    on_policy(tmp_path / "halves", tiny.Source(), 7)
    source = tiny.Source()
    both = on_policy(tmp_path / "halves", source, 12)
    assert equal(whole, both) and source.draws == 6
    # a line tells what the source has said since the last one; the seventh step was the last of its run
    assert lines(tmp_path / "whole", "draws") == [(4, 2), (8, 4), (12, 6)]
    assert lines(tmp_path / "halves", "draws") == [(4, 2), (7, 4), (8, None), (12, 6)]


def test_data_that_ends_ends_the_run(parts, tmp_path):
    result = fit(parts, tmp_path, tiny.Loader(length=4))
    assert (result.step, result.reason) == (4, "end_of_data")
    with disk.open_folder(tmp_path / "checkpoints") as manager:
        assert manager.latest_step() == 4


def test_another_base_is_refused(parts, tmp_path):
    fit(parts, tmp_path, steps=2)
    with pytest.raises(CheckpointError, match="another base: checksum was 'abc' and is 'xyz'"):
        fit(parts, tmp_path, record=Record(config=RECORD.config, base={"checksum": "xyz"}))


def test_one_bad_batch_is_skipped_and_counted(parts, tmp_path):
    result = fit(parts, tmp_path, tiny.Loader(poison={3}), steps=6)
    assert result.reason == "complete"
    assert [row[1:] for row in lines(tmp_path, "loss", "skipped")][3] == (None, 1)  # not a number is null in JSON
    assert [row[1] for row in lines(tmp_path, "skipped")] == [0, 0, 0, 1, 1, 1]


def test_three_bad_batches_in_a_row_stop_the_run_with_a_diagnosis(parts, tmp_path):
    good = fit(parts, tmp_path / "good", steps=4)
    with pytest.raises(NonFiniteError) as error:
        fit(parts, tmp_path / "bad", tiny.Loader(poison={1, 4, 5, 6, 7}))
    message = str(error.value)
    assert "3 steps in a row" in message
    assert "step 5: loss nan" in message and "step 7: loss nan" in message
    assert "sequences 4" in message and "batch 5 of the data" in message
    assert "optim.lr" in message and f"{tmp_path / 'bad' / 'checkpoints'}" in message
    # the last good state: steps 1, 3 and 4 were applied, nothing else
    with disk.open_folder(tmp_path / "bad" / "checkpoints") as manager:
        kept, _ = disk.restore(manager, good.state, RECORD)
    run, _, optimizer, trainable, frozen = parts
    want = state.create(trainable, optimizer, jax.random.key(1))
    loader = tiny.Loader(poison={1})
    for _ in range(4):
        want, _ = run(want, frozen, tiny.micro(next(loader), 2))
    for (path, a), (_, b) in zip(tree.paths(kept.trainable), tree.paths(want.trainable), strict=True):
        assert np.array_equal(a, b), path


def test_evaluation_is_the_mean_over_all_held_out_tokens(parts, tmp_path):
    _, eval_step, _, trainable, frozen = parts
    held = [tiny.batch(100, 4), tiny.batch(101, 4)]
    config = EvalConfig(every=4, at_start=True)
    evaluator = evaluate.held_out(eval_step, frozen, lambda: held, jax.device_put, config)
    result = fit(parts, tmp_path, evaluators=[evaluator], eval=config)
    rows = [row for row in sinks.read(tmp_path) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    params = tree.combine(trainable, frozen)
    logp = np.concatenate([np.asarray(tiny.score("policy", params, b)["logp"])[b["loss_mask"]] for b in held])
    assert rows[0]["eval_loss"] == pytest.approx(-logp.mean(), rel=1e-6)
    assert rows[0]["eval_perplexity"] == pytest.approx(np.exp(-logp.mean()), rel=1e-5)
    assert 0 <= rows[0]["eval_mean_token_accuracy"] <= 1
    assert result.evaluation["loss"] == rows[-1]["eval_loss"]


def scripted(values):
    """An evaluator that gives the values one after the other."""
    left = iter(values)
    return lambda step, state: {"loss": next(left), "exact_match": 0.5}


def test_early_stopping_and_the_best_is_kept(parts, tmp_path):
    """Evaluations 3, 1, 2, 2: the second is best, two without improvement follow, the run stops at step 8."""
    config = EvalConfig(every=2, patience=2)
    result = fit(
        parts,
        tmp_path,
        evaluators=[scripted([3.0, 1.0, 2.0, 2.0, 0.0, 0.0])],
        eval=config,
        checkpoint=CheckpointConfig(every=None, keep_last=1, keep_best=1),
    )
    assert (result.step, result.reason, result.best.step, result.best.value) == (8, "early_stop", 4, 1.0)
    with disk.open_folder(tmp_path / "checkpoints") as manager:
        assert list(manager.all_steps()) == [4, 8]


def test_early_stopping_goes_on_counting_after_a_resume(parts, tmp_path):
    config = EvalConfig(every=2, patience=3)
    fit(parts, tmp_path, steps=6, evaluators=[scripted([1.0, 2.0, 2.0])], eval=config)
    result = fit(parts, tmp_path, evaluators=[scripted([2.0, 2.0, 2.0])], eval=config)
    assert (result.step, result.reason, result.best.step) == (8, "early_stop", 2)


def test_an_unknown_metric_is_refused(parts, tmp_path):
    with pytest.raises(ValueError, match=r"eval.metric: got 'bleu'; this run evaluates exact_match, loss"):
        fit(parts, tmp_path, evaluators=[scripted([1.0])], eval=EvalConfig(every=2, metric="bleu"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_the_shells_code(number, code, parts, tmp_path):
    """The signal comes while step 5 is being fed: that step is finished and saved, and the run can go on."""

    class Loader(tiny.Loader):
        def __next__(self):
            if self.consumed == 5:
                os.kill(os.getpid(), number)
            return super().__next__()

    before = signal.getsignal(number)
    result = fit(parts, tmp_path, Loader(), train=TrainConfig(accumulate=2, prefetch=0))
    assert (result.reason, result.exit_code) == (number.name, code)
    assert signal.getsignal(number) is before
    with disk.open_folder(tmp_path / "checkpoints") as manager:
        assert manager.latest_step() == result.step
    rest = fit(parts, tmp_path)
    assert equal(rest, fit(parts, tmp_path / "whole"))


CHILD = """
    import os, signal, sys, threading
    from pathlib import Path
    import jax
    import numpy as np
    from jaxft.checkpoint.config import CheckpointConfig
    from jaxft.checkpoint.state import Record
    from jaxft.core import tree
    from jaxft.objectives import OBJECTIVES, SFT
    from jaxft.training import loop, optim, state, step
    from jaxft.training.config import LogConfig, OptimConfig, TrainConfig
    from tests.training import tiny

    folder, when = Path(sys.argv[1]), sys.argv[2]

    def kill():
        while True:
            if when == "steps" and (folder / "metrics.jsonl").exists():
                if len((folder / "metrics.jsonl").read_text().splitlines()) >= 7:
                    os.kill(os.getpid(), signal.SIGKILL)
            if when == "saving" and (folder / "checkpoints").exists():
                if any(name.startswith("12.") for name in os.listdir(folder / "checkpoints")):
                    os.kill(os.getpid(), signal.SIGKILL)

    if when != "never":
        threading.Thread(target=kill, daemon=True).start()
    trainable, frozen = tiny.parts(jax.random.key(0), rate=0.1)
    optimizer = optim.make(OptimConfig(lr=0.02, groups={"/b$": 4.0}), trainable, 20)
    run = step.make_step(OBJECTIVES["sft"], SFT(), tiny.score, optimizer)
    result = loop.fit(
        run, state.create(trainable, optimizer, jax.random.key(1)), frozen, tiny.Loader(), folder,
        Record(config={}, base={}),
        loop.Settings(TrainConfig(accumulate=2), checkpoint=CheckpointConfig(every=3), log=LogConfig(progress=False)),
        steps=20,
    )
    np.savez(folder / "final.npz", **{p.replace("/", "."): a for p, a in tree.paths(result.state._replace(key=()))})
"""


def test_killed_at_any_instant_it_is_the_same_run(tmp_path):
    """SIGKILL between steps, then SIGKILL in the middle of writing a checkpoint, then to the end: bitwise the run that
    was never killed, in its parameters, its optimiser's state and every loss it wrote; dropout included."""

    def child(folder, when):
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), when],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return done.returncode, done.stdout + done.stderr

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert child(whole, "never") == (0, "")
    assert child(killed, "steps")[0] == -signal.SIGKILL
    assert not (killed / "final.npz").exists()
    assert child(killed, "saving")[0] == -signal.SIGKILL
    assert child(killed, "never") == (0, "")
    got, want = np.load(killed / "final.npz"), np.load(whole / "final.npz")
    assert sorted(got.files) == sorted(want.files)
    assert all(np.array_equal(got[name], want[name]) for name in want.files)
    names = ("loss", "grad_norm", "learning_rate", "num_tokens")
    assert lines(killed, *names) == lines(whole, *names)
    assert len(lines(whole)) == 20


def test_steps_or_epochs():
    assert loop.total_steps(TrainConfig(), 7) == 7
    assert loop.total_steps(TrainConfig(epochs=2.5), 7) == 18
    assert loop.total_steps(TrainConfig(steps=3), None) == 3
    for config, known, message in (
        (TrainConfig(steps=3, epochs=1.0), 7, "got steps=3 and epochs=1.0; expected one of the two"),
        (TrainConfig(), None, "the length of the data is not known; give train.steps"),
        (TrainConfig(), 0, "got 0 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.total_steps(config, known)


def test_rows_that_do_not_divide_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match=r"train\.accumulate=3 does not divide the 4 rows of `tokens`"):
        fit(parts, tmp_path, train=TrainConfig(accumulate=3))


def test_metrics_are_json(parts, tmp_path):
    fit(parts, tmp_path, tiny.Loader(poison={0}), steps=2)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert jnp.isfinite(fit(parts, tmp_path).state.step)
