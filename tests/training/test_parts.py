"""The small parts of the loop: batches ahead, judging evaluations, diagnosis, throughput, progress, signals."""

import io
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxft.training import evaluate, finite, metrics, prefetch, progress
from jaxft.training.config import EvalConfig
from jaxft.training.evaluate import Best
from tests.training import tiny


def test_batches_come_in_order_each_with_its_own_cursor():
    loader = tiny.Loader(length=5)
    seen = []
    read = prefetch.ahead(loader, 2, lambda batch: batch, depth=2)
    for item in iter(lambda: read(None), None):
        seen.append((item.host["sequence_id"][0, 0], item.cursor["consumed"], loader.consumed))
        assert item.device["tokens"].shape == (2, 2, 12)
    assert seen == [(0, 1, 3), (1, 2, 4), (2, 3, 5), (3, 4, 5), (4, 5, 5)]


def test_micro_batches_are_the_rows_in_order():
    split = prefetch.split({"tokens": np.arange(12).reshape(6, 2)}, 3)["tokens"]
    assert split.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]


def test_judging_by_hand():
    """Lower is better, by at least 0.5 to count: 3 (best), 2.8 (best, but too little), 2.9, 2.0 (best)."""
    config, best, seen = EvalConfig(min_delta=0.5), Best(), []
    for step, value in enumerate([3.0, 2.8, 2.9, 2.0, float("nan")]):
        best, better = evaluate.judge(config, best, step, {"loss": value})
        seen.append((better, best.step, best.waited))
    assert seen == [(True, 0, 0), (True, 1, 1), (False, 1, 2), (True, 3, 0), (False, 3, 1)]
    best, better = evaluate.judge(EvalConfig(metric="exact_match", goal="max"), Best(0.5, 1), 2, {"exact_match": 0.6})
    assert better and best == Best(0.6, 2, 0)


def test_summary_of_an_evaluation():
    """One term is the loss; several are named beside their sum; perplexity is exp of nll and never overflows."""
    assert evaluate.summary({"loss/sft": 2.0, "nll": 0.0}) == {"loss": 2.0, "nll": 0.0, "perplexity": 1.0}
    assert evaluate.summary({"loss/a": 2.0, "loss/b": 1.0}) == {"loss": 3.0, "loss/a": 2.0, "loss/b": 1.0}
    assert evaluate.summary({"loss/sft": 9e9, "nll": 9e9})["perplexity"] < float("inf")


def test_the_watch_counts_only_steps_in_a_row():
    watch = finite.Watch(limit=2)
    good, bad = {"skipped": 0.0, "loss": 1.0, "learning_rate": 0.1}, {"skipped": 1.0, "loss": 1.0, "learning_rate": 0.1}
    bad["grad_norm"] = float("inf")
    assert [watch.see(i, m, {}, i) for i, m in enumerate([bad, good, bad, bad])] == [False, False, False, True]
    message = watch.diagnosis("They are saved in X.")
    assert "step 2: grad_norm inf (learning_rate 0.1; batch 2 of the data)" in message and "step 0" not in message


def test_throughput_by_hand():
    """100 tokens a step, one step each 0.5 s: 200 tokens/s, 2 steps/s. The first step only starts the clock."""
    times = iter([10.0, 10.5, 11.0, 99.0, 99.5])
    meter = metrics.Meter(None, clock=lambda: next(times))
    meter.add(1_000_000)
    assert meter.rates() == {}
    meter.add(100)
    meter.add(100)
    assert meter.rates() == {"tokens_per_second": 200.0, "steps_per_second": 2.0}
    meter.pause()
    assert meter.rates() == {}
    meter.add(100)
    meter.add(100)
    assert meter.rates()["tokens_per_second"] == 200.0


def test_utilisation_by_hand(monkeypatch):
    """At 10 FLOPs a token, 200 tokens/s are 2000 FLOP/s: 25 % of eight devices of 1000 FLOP/s each."""
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1000.0)
    times = iter([0.0, 0.5])
    meter = metrics.Meter(10.0, clock=lambda: next(times))
    meter.add(100)
    meter.add(100)
    assert meter.rates()["mfu"] == pytest.approx(0.25)


def test_peaks():
    assert metrics.peak_flops("NVIDIA H200") == 989e12
    assert metrics.peak_flops("TPU v5 lite") == 197e12 and metrics.peak_flops("TPU v5p") == 459e12
    assert metrics.peak_flops("cpu") is None


def test_facts_leave_out_what_is_not_known():
    few = {"loss": 1.5, "learning_rate": 2e-4}
    assert progress.facts(few) == "loss 1.5000  lr 2.00e-04"
    more = {**few, "tokens_per_second": 12345.6, "mfu": 0.415, "memory_gb": 33.06, "skipped": 2}
    assert progress.facts(more) == "loss 1.5000  lr 2.00e-04  12,346 tokens/s  MFU 42 %  33.1 GB  2 skipped"
    assert [progress.duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_lines_where_there_is_no_terminal(monkeypatch):
    now = iter([100.0, 100.0, 101.0, 111.0, 111.0, 112.0, 112.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    with progress.show(4, 0, True, out) as bar:
        bar.say("hello")
        for step in (1, 2, 3, 4):
            bar.update(step, {"loss": 1.0, "learning_rate": 0.1, "steps_per_second": 2.0})
    lines = out.getvalue().splitlines()
    assert lines[0] == "hello" and lines[-1] == "step 4/4  loss 1.0000  lr 1.00e-01"
    assert lines[1] == "step 1/4  loss 1.0000  lr 1.00e-01  0:02 left"
    assert not any(line.startswith("step 2") for line in lines)


def test_a_bar_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with progress.show(4, 1, True, out) as bar:
        bar.update(2, {"loss": 1.0, "learning_rate": 0.1})
        bar.say("a [line] of its own")
    assert "loss 1.0000" in out.getvalue() and "2/4" in out.getvalue() and "a [line] of its own" in out.getvalue()


def test_a_second_signal_ends_the_process_at_once():
    code = """
        import os, signal, time
        from jaxft.training import interrupt
        with interrupt.listen() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            print(request.signal == signal.SIGTERM, request.exit_code, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ}
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True 143\n"), done.stderr
