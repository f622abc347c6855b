"""What is said of each source of a mixture is what its rows alone would have said; nothing is scored twice for it."""

import json

import jax
import numpy as np
import pytest

from jaxft.objectives import DPO, OBJECTIVES, SFT
from jaxft.training import evaluate, optim, state, step
from jaxft.training.by_source import by_source, counted, present
from jaxft.training.config import EvalConfig, OptimConfig
from jaxft.training.ledger import Ledger
from tests.training import test_loop, test_preference_step, tiny

NAMES = ("chat", "logs", "none")
WHICH = np.array([0, 1, 0, 0, 1, 0, 0, 1], np.int32)


def run(objective, config, batch, key, accumulate=1, score=test_preference_step.score):
    """(trainable after a step, its metrics, times that a score was traced)"""
    calls = []

    def counting(*args):
        calls.append(args[0])
        return score(*args)

    trainable, frozen = tiny.parts(key)
    optimizer = optim.make(OptimConfig(name="sgd", lr=0.1, clip_norm=None), trainable, 10)
    begin = state.create(trainable, optimizer, key, reference=True, carry=objective.carry(config))
    after, metrics = step.make_step(objective, config, counting, optimizer)(
        begin, frozen, tiny.micro(batch, accumulate)
    )
    return jax.device_get(after.trainable), {name: float(value) for name, value in metrics.items()}, len(calls)


@pytest.mark.parametrize(
    "name, config, accumulate",
    [("sft", SFT(), 4), ("dpo", DPO(loss=("sigmoid", "sft"), loss_weights=(1.0, 0.3)), 1)],
)
def test_a_source_is_as_if_it_were_alone(name, config, accumulate, key):
    """Its loss is that of a step on its own rows; the step itself is what it is without sources."""
    row = OBJECTIVES[name]
    batch = tiny.batch(3) if name == "sft" else test_preference_step.rows(3)
    plain, bare, calls = run(row, config, batch, key, accumulate)
    mixed, metrics, more = run(by_source(row, NAMES), config, batch | {"source": WHICH}, key, accumulate)
    assert more == calls
    jax.tree.map(np.testing.assert_array_equal, mixed, plain)
    assert {n: metrics[n] for n in bare} == pytest.approx(bare, rel=1e-6)
    tokens = (batch["segments"] > 0).sum(1)
    for number, source in enumerate(NAMES[:2]):
        _, alone, _ = run(row, config, {n: a[number == WHICH] for n, a in batch.items()}, key)
        terms = [n for n in alone if n.startswith("loss/")] or ["loss"]
        reported = [n for n in ("nll", "mean_token_accuracy", "rewards/accuracies") if n in alone]
        assert len(reported) == 2
        for metric in [*terms, *reported]:
            assert metrics[f"source/{source}/{metric}"] == pytest.approx(alone[metric], rel=1e-5), metric
        assert metrics[f"source/{source}/share"] == pytest.approx(tokens[number == WHICH].sum() / tokens.sum())
    assert metrics["source/none/share"] == 0


@pytest.mark.parametrize("name, config, _", test_preference_step.CASES)
def test_sources_add_up_to_the_whole(name, config, _):
    """Coupled objectives too: what the whole batch decided (the KL, the order) holds for each source's rows."""
    row, batch = OBJECTIVES[name], test_preference_step.batch(5)
    params = tiny.params(jax.random.key(1))
    other = jax.tree.map(lambda a: a * 1.1, params)
    scores = {"policy": test_preference_step.score("policy", params, batch)}
    scores["reference"] = test_preference_step.score("reference", other, batch)
    for aside in row.asked(config).asides:
        part = {n.removeprefix(f"{aside}_"): a for n, a in batch.items() if n.startswith(f"{aside}_")}
        scores |= {
            f"{view}/{aside}": tiny.score(view, p, part) for view, p in (("policy", params), ("reference", other))
        }
    added, carry = {}, row.carry(config)
    if (annotate := row.annotation(config)) is not None:
        added, carry = annotate(scores, batch, carry)
    given = {**batch, **added, "source": WHICH}
    terms, metrics = by_source(row, NAMES).fn(config, scores, given, carry)
    for term, whole in terms.items():
        metric = f"loss/{term}" if len(terms) > 1 else "loss"
        parts = [metrics[f"source/{source}/{metric}"] for source in NAMES]
        assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), rel=1e-4)
        assert sum(float(part.weight) for part in parts) == pytest.approx(float(whole.weight))
        assert float(parts[0].weight) > 0 and float(parts[2].weight) == 0


def test_held_out_sources(key):
    """Together and apart, over batches of different sources; one without held-out rows is not mentioned."""
    trainable, frozen = tiny.parts(key)
    optimizer = optim.make(OptimConfig(), trainable, 10)
    objective = by_source(OBJECTIVES["sft"], NAMES)
    eval_step = step.make_eval_step(objective, SFT(), tiny.score)
    batches = [tiny.batch(1) | {"source": np.zeros(8, np.int32)}, tiny.batch(2) | {"source": WHICH}]
    measured = evaluate.held_out(eval_step, frozen, lambda: batches, lambda batch: batch, EvalConfig())
    found = measured(0, state.create(trainable, optimizer, key))
    logp = [-np.asarray(tiny.score("", tiny.params(key), batch)["logp"]) for batch in batches]
    for number, source in enumerate(NAMES[:2]):
        keep = [b["loss_mask"] & (b["source"] == number)[:, None] for b in batches]
        want = np.concatenate([x[k] for x, k in zip(logp, keep, strict=True)]).mean()
        assert found[f"source/{source}/nll"] == pytest.approx(want, rel=1e-5)
        assert found[f"source/{source}/perplexity"] == pytest.approx(np.exp(want), rel=1e-4)
    assert not [name for name in found if "none" in name or "share" in name]


class Loader(tiny.Loader):
    """Rows of the first source alone in every other batch."""

    def __next__(self):
        number = self.consumed
        return super().__next__() | {"source": WHICH[:4] * (number % 2)}


def test_tokens_are_counted_over_a_resume(tmp_path, key):
    """By hand from the batches, though the run was cut in two; an absent source says nothing of its loss."""
    trainable, frozen = tiny.parts(key)
    optimizer = optim.make(OptimConfig(lr=0.05, schedule="constant"), trainable, 6)
    made = step.make_step(by_source(OBJECTIVES["sft"], NAMES[:2]), SFT(), tiny.score, optimizer)
    for steps in (3, 6):
        test_loop.fit((made, None, optimizer, trainable, frozen), tmp_path, Loader(), steps=steps)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    had, batches = np.zeros(2), Loader()
    for line in lines:
        batch = next(batches)
        sizes = (batch["segments"] > 0).sum(1)
        had += [sizes[batch["source"] == number].sum() for number in range(2)]
        assert [line.get(f"source/{name}/num_tokens", 0) for name in NAMES[:2]] == had.tolist()
        assert ("source/logs/loss" in line) == bool(batch["source"].any()) and "source/chat/loss" in line
        assert line["num_tokens"] == had.sum() and not [name for name in line if name.endswith("share")]
    assert len(lines) == 6


def test_what_is_not_there_is_not_told():
    values = {"loss": 1.0, "source/a/share": 0.25, "source/a/nll": 2.0, "source/ab/share": 0.0, "source/ab/nll": 0.0}
    assert present(values) == {"loss": 1.0, "source/a/share": 0.25, "source/a/nll": 2.0}
    counts = {"ab": 7}
    assert counted(values, 200, counts) == {
        "loss": 1.0, "source/a/nll": 2.0, "source/a/num_tokens": 50.0, "source/ab/num_tokens": 7.0,
    }  # fmt: skip
    assert counts == {"ab": 7, "a": 50}


def test_members_of_a_sweep(tmp_path):
    """Each one's own lines leave out what is not in a step, too."""
    ledger = Ledger([tmp_path / "a", tmp_path / "b"], 1, 2)
    for share in (0.0, 0.5):
        both = {"loss": [1.0, 2.0], "skipped": [0, 0], "source/x/share": [share] * 2, "source/x/nll": [3.0, 4.0]}
        ledger.read(1 + int(share * 2), {name: np.array(values) for name, values in both.items()} | {"tokens": 8})
    ledger.close()
    first, second = (json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines())
    assert "source/x/nll" not in first and second["source/x/nll"] == 4.0 and second["source/x/share"] == 0.5
