"""jaxft judge: preferences of a judge over a policy's replies, by a model here or behind an address; nothing is asked
twice, and what comes out trains dpo."""

import collections
import dataclasses
import json
import math

import pytest
import yaml

from jaxft import rewards
from jaxft.cli import judge, judge_models
from jaxft.cli.judge import JudgeConfig
from jaxft.cli.teach import AnsweringTeacher
from jaxft.rewards.feedback import constitution
from jaxft.rewards.feedback.asking import Answer, Failure, Question
from jaxft.rewards.judge import Judge, Local
from tests.cli.commands import jaxft
from tests.rewards.feedback.stub import Reply, said, serving
from tests.rewards.feedback.test_verdicts import replies


@pytest.fixture
def settings(tiny, tmp_path):
    """Five prompts to a random model, one of them twice."""
    prompts = [[{"role": "user", "content": f"Spell {i}"}] for i in (0, 1, 2, 3, 4, 0)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return {
        "policy": {"path": str(tiny), "dtype": "float32"},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "generate": {"max_new_tokens": 6, "temperature": 1.0, "batch": 8},
        "samples": 3,
        "finished": False,
    }


def written(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def start(capsys, tmp_path, settings, name, *words):
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(settings))
    code, out, err = jaxft(capsys, "judge", tmp_path / "judge.yaml", f"run_dir={tmp_path / name}", *words)
    return code, out, err, tmp_path / name


def test_a_model_judges_itself_and_dpo_learns_from_it(capsys, settings, tiny, tmp_path):
    """The confidences and the choice of best and worst follow from the ledger, in both orders."""
    code, _, err, folder = start(capsys, tmp_path, settings, "a", "confidence=0.5", "pairs=all")
    assert code == 0, err
    rows, ledger = written(folder, "rows.jsonl"), written(folder, "judgements.jsonl")
    kinds = collections.Counter(record["asks"] for record in ledger)
    assert kinds == {"reply": 15, "compare": 5 * 3 * 2} and 0 < len(rows) <= 15
    first = {}
    for record in ledger:
        if record["asks"] == "compare":
            a, b = (math.exp(record["answer"]["logp"][label]) for label in "AB")
            first[record["principle"], *replies(record["chat"][0]["content"])] = a / (a + b)
    for row in rows:
        chosen, rejected = (row[name][0]["content"] for name in ("chosen", "rejected"))
        p = (first[row["principle"], chosen, rejected] + 1 - first[row["principle"], rejected, chosen]) / 2
        assert row["confidence"] == pytest.approx(p) and p >= 0.5
        assert row["prompt"][0]["content"].startswith("Spell")
        drawn = constitution.read().chosen(row["prompt"], 0, 1)
        assert row["principle"] == drawn[0].name
    report = json.loads((folder / "report.json").read_text())
    assert report["prompts"] == 5 and report["rows"] == len(rows) and 0 <= report["order_decided"] <= 1
    code, _, err = jaxft(
        capsys, "train", f"model.path={tiny}", "model.dtype=float32", "objective.name=dpo", "train.steps=1",
        f"data.path={folder / 'rows.jsonl'}", "data.max_length=64", f"run_dir={tmp_path / 'dpo'}", "train.batch=8",
        "eval.samples=0",
    )  # fmt: skip
    assert code == 0, err


def by_length(n, body):
    """Surely prefers the longer reply."""
    a, b = replies(body["messages"][0]["content"])
    return said("A" if len(a) > len(b) else "B", {"A": 0.9, "B": 0.1} if len(a) > len(b) else {"A": 0.1, "B": 0.9})


def test_what_was_answered_is_never_asked_again(capsys, settings, tmp_path):
    """The endpoint is gone after a while; the run goes on where it was, to the rows of one that nothing happened to."""
    with serving(by_length) as stub:
        whole = {**settings, "judge": {"endpoint": stub.settings()}}
        code, _, err, uncut = start(capsys, tmp_path, whole, "whole")
        assert code == 0, err
        total = len(stub.seen)
    down = [True]

    def answer(n, body):
        return Reply(404) if down[0] and n >= 9 else by_length(n, body)

    with serving(answer) as stub:
        cut = {**settings, "judge": {"endpoint": stub.settings(concurrency=1)}}
        code, _, err, folder = start(capsys, tmp_path, cut, "cut")
        assert code == 1 and "no model 'stub' there" in err and "--resume goes on" in err
        assert not (folder / "rows.jsonl").exists()
        seen = len(stub.seen)
        down[0] = False
        ledger = folder / "judgements.jsonl"
        ledger.write_bytes(ledger.read_bytes()[:-20])  # in the middle of a line: its answer is asked for again
        code, out, err, _ = start(capsys, tmp_path, cut, "cut", "--resume")
        assert code == 0 and "answers are there already" in out, err
        assert len(stub.seen) - seen == total - 9 + 1
        assert (folder / "rows.jsonl").read_bytes() == (uncut / "rows.jsonl").read_bytes()
        before = len(stub.seen)
        code, _, err, _ = start(capsys, tmp_path, cut, "cut", "--resume")
        assert code == 0 and len(stub.seen) == before
        code, _, err, _ = start(capsys, tmp_path, cut, "cut")
        assert code == 2 and "holds a run" in err
    for row in written(folder, "rows.jsonl"):
        chosen, rejected = (len(row[name][0]["content"]) for name in ("chosen", "rejected"))
        assert chosen >= rejected and row["confidence"] == pytest.approx(0.9)


def test_a_judge_that_prefers_the_first_place_decides_nothing(capsys, settings, tmp_path):
    with serving(lambda n, body: said("A")) as stub:
        settings["judge"] = {"endpoint": stub.settings(logprobs=False)}
        code, out, err, folder = start(capsys, tmp_path, settings, "a")
        assert code == 1 and "nothing to train on" in out and not (folder / "rows.jsonl").exists(), err
        report = json.loads((folder / "report.json").read_text())
        assert report["order_decided"] == 1.0 and report["first_favoured"] == 0.5 and report["confidence"] == 0.5
        code, _, err, kept = start(capsys, tmp_path, settings, "kept", "unsure=keep")
        assert code == 0 and {row["confidence"] for row in written(kept, "rows.jsonl")} == {0.5}, err


def test_ratings_become_preferences(capsys, settings, tmp_path):
    def rating(n, body):
        reply = body["messages"][0]["content"].split("[Reply ")[1].split("\n", 1)[1].split("\n[End of Reply")[0]
        return said(str(1 + len(reply) % 10))

    with serving(rating) as stub:
        settings |= {"judge": {"endpoint": stub.settings(logprobs=False)}, "method": "pointwise"}
        code, _, err, folder = start(capsys, tmp_path, settings, "a")
        assert code == 0, err
        assert len(stub.seen) == 15
    for row in written(folder, "rows.jsonl"):
        chosen, rejected = (1 + len(row[name][0]["content"]) % 10 for name in ("chosen", "rejected"))
        assert chosen > rejected and row["confidence"] == 1.0


def config(**more):
    return JudgeConfig(policy=AnsweringTeacher("x"), **more)


def test_which_pairs_are_written():
    """0 beats 1 at .9 and 2 at .7, 2 beats 1 at .55: win-rates .8, .275, .425."""
    first = {(0, 1): 0.9, (0, 2): 0.7, (1, 2): 0.45}
    assert judge.preferences(config(), first) == ([(0, 1, 0.9)], "")
    sure, _ = judge.preferences(config(pairs="all"), first)
    assert sure == [(0, 1, 0.9), (0, 2, 0.7)]
    sure, _ = judge.preferences(config(pairs="all", unsure="keep"), first)
    assert [(one.chosen, one.rejected) for one in sure] == [(0, 1), (0, 2), (2, 1)]
    assert sure[2].confidence == pytest.approx(0.55)
    sure, why = judge.preferences(config(confidence=0.95), first)
    assert not sure and "unsure (below confidence 0.95)" in why
    ring = {(0, 1): 0.45, (0, 2): 1.0, (1, 2): 0.0}  # 0 has won most and 1 least, and yet 1 beats 0
    assert judge.preferences(config(), ring)[0] == []


def test_refusals(capsys, settings, tmp_path):
    for words, told in (
        (["samples=1"], "samples: got 1"),
        (["generate.temperature=0"], "samples that are all the same"),
        (["confidence=0.4"], "from 0.5 to 1"),
        (["constitution=no.yaml"], "no.yaml: a constitution cannot be read"),
        (["judge.endpoint.url=http://x/v1"], "`judge.endpoint.model` must be given"),
        (["judge.endpoint={url: 'http://x/v1', model: m, key_env: NOT_SET}"], "NOT_SET is not set"),
        (["policy.path=/nowhere"], "/nowhere"),
        (["judge.modle=x"], "did you mean `judge.model`?"),
    ):
        code, _, err, folder = start(capsys, tmp_path, settings, "r", *words)
        assert code in (1, 2) and told in err and "Traceback" not in err, (words, err)
        assert not folder.exists()


def test_a_model_as_reward(tiny, tmp_path):
    """Handed in by the command line: the same answers as the verb's judge, written beside the run."""
    local = Local(path=str(tiny), dtype="float32", batch=4)
    chosen = [("judge", Judge(model=local)), ("judge", Judge(model=local, method="pointwise", weight=0.5))]
    functions = rewards.made(judge_models.table(rewards.REWARDS, tmp_path, None), chosen)
    found = rewards.call(functions, ["p", "p", "q", "q"], ["one", "another", "one", "two"], {})
    assert not found.reports and found.values.shape == (4, 2)
    wins, ratings = found.values.T
    assert wins[0] + wins[1] == pytest.approx(1) and wins[2] + wins[3] == pytest.approx(1) and (wins != 0.5).all()
    assert ((ratings > 1) & (ratings < 10)).all()
    records = written(tmp_path, "judgements.jsonl")
    assert collections.Counter(record["asks"] for record in records) == {"compare": 4, "rate": 4}
    assert records[0]["judge"]["weights"] and records[0]["judge"]["model"] == str(tiny)


def test_a_question_that_is_too_long_fails_alone(tiny):
    """Where the judge has positions that end: 120 of them, of which a label takes up to 4."""
    found = judge_models.local(Local(path=str(tiny), dtype="float32"), None)
    short = dataclasses.replace(found.speaker.model.config, learned_positions=True, max_positions=120)
    model = dataclasses.replace(found.speaker.model, config=short)
    judge_ = dataclasses.replace(found, speaker=dataclasses.replace(found.speaker, model=model))
    asked = [Question(({"role": "user", "content": "word " * n},), ("A", "B")) for n in (200, 1)]
    answers = dict(judge_.answers(asked[:1]))
    assert isinstance(answers[0], Failure) and "positions and the judge has 120" in str(answers[0])
    answers = dict(found.answers(asked))
    assert all(isinstance(answer, Answer) and {*answer.logp} == {"A", "B"} for answer in answers.values())


def test_a_policy_learns_from_a_judge(capsys, settings, tiny, tmp_path):
    """In the loop of GRPO: win-rates within each group, kept beside the run."""
    with serving(by_length) as stub:
        words = [
            "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'prompts.jsonl'}",
            "data.max_length=64", "objective=grpo", "train.batch=8", "train.steps=1", "rollout.prompts=2",
            "rollout.samples=4", "rollout.max_new_tokens=6", f"run_dir={tmp_path / 'run'}", "eval.samples=0",
            f"rewards=[{{name: judge, endpoint: {json.dumps(stub.settings())}}}]",
        ]  # fmt: skip
        code, _, err = jaxft(capsys, *words, "data.eval_examples=2")
        assert code == 2 and "compares completions of one prompt, of which an evaluation has one" in err
        code, _, err = jaxft(capsys, *words)
        assert code == 0, err
        assert 0 < len(stub.seen) <= 2 * 2 * 6
        asked = len(stub.seen)
    assert len(written(tmp_path / "run", "judgements.jsonl")) == asked
    [first, *_] = written(tmp_path / "run", "metrics.jsonl")
    assert first["reward"] == pytest.approx(0.5)  # a win-rate within groups
    for row in written(tmp_path / "run", "rollouts.jsonl"):
        assert 0.1 - 1e-6 <= row["rewards"]["judge"] <= 0.9 + 1e-6
