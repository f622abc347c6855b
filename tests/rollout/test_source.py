"""The source of rollouts: what its minibatches hold, which prompts it asks, and that it goes on exactly."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxft.checkpoint import cursor
from jaxft.data import DataError, Prompt
from jaxft.data.questions import Questions
from jaxft.rollout import layout
from jaxft.rollout.config import RolloutConfig
from jaxft.rollout.generate import Completion
from jaxft.rollout.source import Rewards, Rows, Said, Source

PAD = 99


def prompts(count):
    """Prompt i is i + 1 tokens of the number i."""
    return [Prompt(str(i), (i,) * (i + 1), "", f"row {i}", columns={"number": i}) for i in range(count)]


def sample(config):
    """Completion s of prompt i for a seed: tokens [i, seed mod 97, s], as told by a state that counts."""

    def made(state, asked, seed):
        state.seen.append((seed, [prompt.text for prompt in asked]))
        return [
            Completion([int(p.text), seed % 97, s], [-0.1, -0.2, -0.5 - s], s % 2 == 0, [-0.3, -0.4, -0.6])
            for p in asked
            for s in range(config.samples)
        ]

    return made


def judge(spread=lambda number: True):
    """The first function says the sample's number (0 for prompts without a spread), the second nothing of sample 0."""

    def judged(asked, completions):
        first = [c.tokens[2] if spread(p.columns["number"]) else 0 for p, c in zip(asked, completions, strict=True)]
        second = [np.nan if c.tokens[2] == 0 else 1.0 for c in completions]
        texts = [f"said {c.tokens[2]}" for c in completions]
        return Said(texts, np.array([first, second], np.float32).T, [{"note": t} for t in texts], {"logged": 2.0})

    return Rewards(("first", "second"), (1.0, 0.0), judged)


def annotate(state, rollout, running):
    """The advantage is the first reward, and the running quantity counts rollouts."""
    first = np.where(rollout["loss_mask"], rollout["reward"][:, :1], 0).astype(np.float32)
    old = np.where(rollout["loss_mask"], rollout["sampler_logp"] + 0.25, 0)
    metrics = {"rewards/0/mean": 1.0, "reward": 3.0}
    return {"advantage": first, "old_logp": old.astype(np.float32)}, metrics, {"count": running["count"] + 1}


class Table:
    def __init__(self):
        self.rows, self.cuts = {}, []

    def write(self, step, rows):
        self.rows[step] = rows

    def cut(self, step):
        self.cuts.append(step)


def source(count=10, spread=lambda number: True, rows=4, shuffle=False, **settings):
    config = RolloutConfig(**{"prompts": 2, "samples": 4, "max_new_tokens": 3, **settings})
    how = {"running": {"count": 0.0}, "seed": 5, "shuffle": shuffle, "table": Table()}
    return Source(
        config, Questions(prompts(count), None), judge(spread), sample(config), annotate, Rows(rows, PAD), **how
    )


def state(step=0):
    return SimpleNamespace(step=np.int32(step), seen=[])


def test_sequences_as_arrays_by_hand():
    """Prompts of 1 and 2 tokens after one reserved position, completions of 2 and 1."""
    asked = [Prompt("a", (7,), "", ""), Prompt("b", (8, 9), "", "", task=3)]
    made = layout.arrays(
        asked, [Completion([4, 5], [-1.0, -2.0], True, [-5.0, -6.0]), Completion([6], [-3.0], False, [-7.0])],
        samples=1, pad_id=PAD, reserved=1,
    )  # fmt: skip
    assert made["tokens"].shape == (2, 16)
    assert made["tokens"][:, :5].tolist() == [[PAD, 7, 4, 5, PAD], [PAD, 8, 9, 6, PAD]]
    assert made["positions"][:, :5].tolist() == [[0, 1, 2, 3, 0]] * 2
    assert made["segments"][:, :5].tolist() == [[1, 1, 1, 1, 0]] * 2
    assert made["loss_mask"][:, :5].tolist() == [[False, False, True, True, False], [False] * 3 + [True, False]]
    assert made["sampler_logp"][:, :5].tolist() == [[0, 0, -1, -2, 0], [0, 0, 0, -3, 0]]
    assert made["finished"].tolist() == [True, False] and made["group"].tolist() == [0, 1]
    assert made["task_ids"][:, 0].tolist() == [0, 3] and made["sequence_mask"].all()


def test_widths_are_few_and_waste_a_quarter_at_most():
    widths = {layout.width(n) for n in range(257, 1025)}
    assert widths == {320, 384, 448, 512, 640, 768, 896, 1024}
    assert layout.width(1) == 16 and layout.width(33) == 48 and layout.width(300, 128) == 384


def test_each_pass_has_every_sequence_once_with_what_was_estimated():
    made = source(epochs=2)
    batches = [made.next(state())[0] for _ in range(4)]
    names = [[(b["tokens"][r, 0], int(b["tokens"][r][b["loss_mask"][r]][2])) for r in range(4)] for b in batches]
    assert sorted(names[0] + names[1]) == sorted(names[2] + names[3]) == [(p, s) for p in (0, 1) for s in range(4)]
    assert names[:2] != names[2:]
    for batch in batches:
        assert not {"reward", "reward_weight", "finished", "group", "value"} & batch.keys()
        samples = [row[mask][2] for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True)]
        assert batch["advantage"].max(1).tolist() == samples


def test_metrics_come_with_the_first_minibatch_of_a_rollout():
    made = source()
    (_, first), (_, second), (_, third) = (made.next(state(i)) for i in range(3))
    assert second == {} and third["rewards/first/mean"] == 1.0 and "rewards/0/mean" not in third
    assert first["logged"] == 2.0 and first["reward"] == 3.0
    assert first["sampling/sampling_logp_difference/mean"] == pytest.approx(0.25)
    assert {"time/rollout", "time/reward", "time/score", "time/update"} <= first.keys()
    assert made.table.rows.keys() == {1, 3}
    row = made.table.rows[1][1]
    assert row == {
        "prompt": "0", "completion": "said 1", "rewards": {"first": 1.0, "second": 1.0}, "reward": 1.0,
        "advantage": 1.0, "tokens": 3, "finished": False, "note": "said 1",
    }  # fmt: skip
    assert made.table.rows[1][0]["rewards"]["second"] is None
    json.dumps(made.table.rows[1])


def test_prompts_come_once_a_pass_and_draws_differ():
    made, policy = source(count=5, shuffle=True), state()
    for _ in range(10):
        made.next(policy)
    texts = [text for _, asked in policy.seen for text in asked]
    assert sorted(texts[:5]) == sorted(texts[5:]) == [str(i) for i in range(5)] and texts[:5] != texts[5:]
    assert len({seed for seed, _ in policy.seen}) == 5


def test_dynamic_sampling_fills_up_and_loses_no_prompt():
    """Odd prompts have a spread. 0 and 1 are asked, then 2 and 3: 1 and 3 are the rollout. Then 4 to 7: 5 and 7."""
    made, policy = source(count=8, spread=lambda number: number % 2 == 1, dynamic=True), state()
    batches = [made.next(policy) for _ in range(4)]
    assert [sorted({*b["tokens"][:, 0].tolist()}) for b, _ in batches] == [[1, 3], [1, 3], [5, 7], [5, 7]]
    metrics = batches[0][1]
    assert (metrics["dynamic/rounds"], metrics["dynamic/kept_ratio"]) == (2, 0.5)
    assert metrics["dynamic/reward"] == pytest.approx((0 + 1.5 + 0 + 1.5) / 4)
    assert len({seed for seed, _ in policy.seen}) == 4


def test_dynamic_sampling_leaves_what_was_not_looked_at_for_the_next_rollout():
    """All have a spread but prompt 0: of 2 and 3 only 2 is needed, and 3 is the first of the next rollout."""
    made, policy = source(count=8, spread=lambda number: number != 0, dynamic=True), state()
    made.next(policy), made.next(policy), made.next(policy)
    assert [asked for _, asked in policy.seen] == [["0", "1"], ["2", "3"], ["3", "4"]]


def test_dynamic_sampling_ends_after_its_rounds():
    made, policy = source(spread=lambda number: False, dynamic=True, dynamic_rounds=2), state()
    batch, metrics = made.next(policy)
    assert len(policy.seen) == 3 and metrics["dynamic/kept_ratio"] == 0
    assert set(batch["tokens"][:, 0].tolist()) <= {0, 1}


@pytest.mark.parametrize("taken", range(1, 10))
def test_it_goes_on_exactly_from_any_minibatch(taken):
    """The cursor goes through JSON, its arrays beside it."""
    how = {"epochs": 2, "shuffle": True, "dynamic": True, "spread": lambda number: number % 3 > 0}
    whole, policy = source(**how), state()
    expected = [whole.next(policy)[0] for _ in range(10)]
    first = source(**how)
    for _ in range(taken):
        first.next(state(taken - 1))
    plain, arrays = cursor.parted(first.state())
    assert bool(arrays) == (taken % 4 > 0)
    again = source(**how)
    again.restore(cursor.joined(json.loads(json.dumps(plain)), arrays))
    for number in range(taken, 10):
        batch = again.next(state())[0]
        assert batch.keys() == expected[number].keys()
        assert all(np.array_equal(batch[name], expected[number][name]) for name in batch)
    assert again.running == whole.running and again.table.cuts == [first.step]


def test_the_cursor_of_other_prompts_is_refused():
    made = source()
    made.next(state())
    with pytest.raises(DataError, match="rollout cursor: data"):
        source(count=9).restore(made.state())


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="2 prompts x 4 samples are 8 sequences, which 3 rows a step"):
        source(rows=3)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"samples": 0}, {"top_p": 0.0}, {"log_samples": -1}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"rollout.{next(iter(wrong))}: got"):
        RolloutConfig(**wrong)
