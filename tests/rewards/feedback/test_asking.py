"""The ledger: nothing is asked twice, in one call, in one run, or after a kill."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.border.errors import ConfigError
from jaxft.rewards.feedback import asking
from jaxft.rewards.feedback.asking import Answer, Failure, Ledger, Question

ROOT = Path(__file__).resolve().parents[3]


class Echo:
    """Says what it was asked, last question first; "bad" it cannot answer."""

    def __init__(self, name="echo"):
        self.name, self.asked = name, []

    def identity(self, labels):
        return {"name": self.name}

    def answers(self, questions):
        for number in reversed(range(len(questions))):
            text = questions[number].chat[0]["content"]
            self.asked.append(text)
            if text == "kill":
                raise KeyboardInterrupt
            yield number, Failure("cannot") if text == "bad" else Answer(text.upper(), {"A": -0.5})


def question(text, **about):
    return Question(({"role": "user", "content": text},), about=about)


def texts(answers):
    return [answer.text if isinstance(answer, Answer) else str(answer) for answer in answers]


def test_equal_questions_are_asked_once(tmp_path):
    file, judge = tmp_path / "l.jsonl", Echo()
    with Ledger(file) as ledger:
        assert texts(ledger.ask(judge, [question(t, order=i) for i, t in enumerate("abab")])) == [*"ABAB"]
        assert texts(ledger.ask(judge, [question("b"), question("c")])) == ["B", "C"]
        assert ledger.asked == 3
    with Ledger(file) as again:
        [answer] = again.ask(judge, [question("a")])
        assert answer == Answer("A", {"A": -0.5}, True)
        assert texts(again.ask(Echo("another"), [question("a")])) == ["A"]
        assert again.asked == 1
    assert judge.asked == ["b", "a", "c"]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["chat"][0]["content"], r["judge"]["name"]) for r in records] == [
        ("b", "echo"), ("a", "echo"), ("c", "echo"), ("a", "another")]  # fmt: skip
    assert records[0]["order"] == 1 and records[0]["answer"]["text"] == "B"
    assert len({record["id"] for record in records}) == 4


def test_what_was_answered_before_a_kill_is_kept(tmp_path):
    file, judge = tmp_path / "l.jsonl", Echo()
    with pytest.raises(KeyboardInterrupt):
        Ledger(file).ask(judge, [question(text) for text in ("x", "kill", "y", "z")])
    file.write_bytes(file.read_bytes() + b'{"id": "cut')
    with Ledger(file) as ledger:
        assert texts(ledger.ask(judge, [question("x"), question("y"), question("z")])) == [*"XYZ"]
    assert judge.asked == ["z", "y", "kill", "x"]
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3


def test_a_failure_is_written_down_and_asked_again(tmp_path):
    file, judge = tmp_path / "l.jsonl", Echo()
    for _ in range(2):
        with Ledger(file) as ledger:
            assert texts(ledger.ask(judge, [question("bad"), question("a")])) == ["cannot", "A"]
    assert judge.asked == ["a", "bad", "bad"]
    assert [json.loads(line).get("failed") for line in file.read_text().splitlines()] == [None, "cannot", "cannot"]


def test_a_file_that_is_no_ledger_or_in_use_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "a", "answer": {"text": "A"}}\n{"prompt": 3}\n')
    with pytest.raises(ConfigError, match=r"x.jsonl:2: no answer of a judge"):
        Ledger(tmp_path / "x.jsonl").open()
    with Ledger(tmp_path / "y.jsonl"), pytest.raises(ConfigError, match="another process is writing it"):
        Ledger(tmp_path / "y.jsonl").open()


def test_in_memory_alone():
    judge, ledger = Echo(), Ledger()
    assert texts(ledger.ask(judge, [question("a")]) + ledger.ask(judge, [question("a")])) == ["A", "A"]
    assert judge.asked == ["a"]


def test_shares_are_of_the_labels_alone():
    answer = Answer("A", {"A": math.log(0.3), "B": math.log(0.1), "The": math.log(0.6)})
    assert asking.shares(answer, ("A", "B"), None) == pytest.approx({"A": 0.75, "B": 0.25})
    far = Answer("", {"A": -2000.0, "B": -2000.0 + math.log(3)})
    assert asking.shares(far, ("A", "B"), None) == pytest.approx({"A": 0.25, "B": 0.75})
    assert asking.shares(Answer("A", {"A": -0.1}), ("A", "B"), None) == {"A": 1.0, "B": 0.0}
    assert asking.shares(Answer("?", {"C": -0.1}), ("A", "B"), None) is None
    assert asking.shares(Answer("B"), ("A", "B"), "B") == {"A": 0.0, "B": 1.0}
    assert asking.shares(Answer("hm"), ("A", "B"), None) is None


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxft.rewards.feedback.asking import Answer, Ledger, Question

class Judge:
    def identity(self, labels):
        return {}

    def answers(self, questions):
        for number, question in enumerate(questions):
            if question.chat[0]["content"] == "7" and len(sys.argv) > 2:
                os.kill(os.getpid(), signal.SIGKILL)
            print(question.chat[0]["content"], end=" ", flush=True)
            yield number, Answer(f"said {question.chat[0]['content']}")

asked = [Question(({"role": "user", "content": str(i)},)) for i in range(12)]
said = Ledger(Path(sys.argv[1])).ask(Judge(), asked)
assert [answer.text for answer in said] == [f"said {i}" for i in range(12)]
"""


def test_a_process_that_is_killed_loses_no_answer(tmp_path):
    words = [sys.executable, "-c", KILLED, str(tmp_path / "l.jsonl")]
    killed = subprocess.run([*words, "kill"], capture_output=True, text=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and killed.stdout == "0 1 2 3 4 5 6 ", killed.stderr
    after = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert after.returncode == 0 and after.stdout == "7 8 9 10 11 ", after.stderr
