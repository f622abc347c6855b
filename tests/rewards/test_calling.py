"""Rewards as they are asked: what they are given, what they may fail at, and who is told."""

import asyncio
import math
import threading

import numpy as np
import pytest

from jaxft import rewards
from jaxft.border import fields
from jaxft.border.errors import ConfigError
from jaxft.rewards import REWARDS, Asked, Own, Pattern, RewardError

TEXTS = ["a", "bb", "ccc"]


def call(*functions, columns=None, state=None, **settings):
    asked = [Asked(f"f{i}", function, **settings) for i, function in enumerate(functions)]
    return rewards.call(asked, ["p"] * 3, TEXTS, columns or {}, state)


def values(judged):
    return [[None if math.isnan(v) else v for v in row] for row in judged.values.tolist()]


def test_values_are_a_row_a_completion():
    judged = call(lambda prompts, completions: map_length(completions), lambda p, c: [None, True, np.float32(0.5)])
    assert judged.values.dtype == np.float32 and judged.reports == ()
    assert values(judged) == [[1, None], [2, 1], [3, 0.5]]
    assert call().values.shape == (3, 0)
    assert values(call(lambda completions: np.array([1, 2, 3]))) == [[1], [2], [3]]


def map_length(completions):
    return [len(text) for text in completions]


def test_functions_are_given_what_they_name():
    seen = {}

    def all_columns(prompts, completions, **columns):
        seen["all"] = columns
        return [0] * 3

    def some(completions, answer, *, finished, absent=7):
        seen["some"] = (completions, answer, finished, absent)
        return [0] * 3

    def own_names(asked, said, answer):
        seen["own"] = (asked, said, answer)
        return [0] * 3

    def logging(trainer_state, log_metric, log_extra, completions, **columns):
        seen["logging"] = (trainer_state, columns)
        log_metric("length", 1)
        log_metric("length", 2)
        log_extra("upper", [text.upper() for text in completions])
        return [0] * 3

    columns = {"answer": [1, 2, 3], "finished": [True] * 3, "prompt": ["row"] * 3}
    judged = call(all_columns, some, own_names, logging, columns=columns, state="state")
    assert judged.reports == ()
    assert seen["all"] == {"answer": [1, 2, 3], "finished": [True] * 3}
    assert seen["some"] == (TEXTS, [1, 2, 3], [True] * 3, 7)
    assert seen["own"] == (["p"] * 3, TEXTS, [1, 2, 3])
    assert seen["logging"] == ("state", {**seen["all"], "prompts": ["p"] * 3})
    assert judged.metrics == {"length": 1.5} and judged.extras == {"upper": ["A", "BB", "CCC"]}


def test_async_functions_work_at_once_and_beside_plain_ones():
    started, plain = threading.Barrier(2, timeout=20), []

    async def one(completions, **columns):
        await asyncio.to_thread(started.wait)  # until the other is there as well
        return [1.0] * len(completions)

    class Two:
        async def __call__(self, completions, **columns):
            await asyncio.to_thread(started.wait)
            return [2.0] * len(completions)

    async def inside():
        plain.append(asyncio.get_running_loop())
        return call(one, lambda completions: [3.0] * 3, Two())

    assert values(call(one, lambda completions: [3.0] * 3, Two())) == [[1, 3, 2]] * 3
    assert values(asyncio.run(inside())) == [[1, 3, 2]] * 3  # as in a notebook, which has a loop of its own


def test_a_failure_is_of_the_samples_that_it_is_of():
    def picky(completions, log_metric):
        log_metric("asked", len(completions))
        if "bb" in completions:
            raise KeyError("no bb")
        return [1.0] * len(completions)

    async def picky_too(completions):
        return [1.0 / (len(text) - 2) for text in completions]

    judged = call(picky, picky_too)
    assert values(judged) == [[1, -1], [None, None], [1, 1]]
    assert [(report.reward, report.sample) for report in judged.reports] == [("f0", 1), ("f1", 1)]
    assert "test_calling.py, line" in str(judged.reports[0]) and "KeyError: 'no bb'" in str(judged.reports[0])
    assert "ZeroDivisionError" in str(judged.reports[1]) and "the completion is 'bb'" in str(judged.reports[1])
    assert judged.metrics == {"asked": 1.0}


@pytest.mark.parametrize(
    ("gave", "want", "samples", "said"),
    [
        ([1.0, math.nan, 2.0], [1, None, 2], [1], "gave nan"),
        ([math.inf, 1, 2], [None, 1, 2], [0], "gave inf"),
        ([1, -1e300, 2], [1, None, 2], [1], "gave -1e"),
        (["x", 1, None], [None, 1, None], [0], "gave 'x'"),
        ([1.0, 2.0], [None] * 3, [None], "gave 2 values for 3 completions"),
        (1.0, [None] * 3, [None], "expected a list of numbers"),
        ("abc", [None] * 3, [None], "expected a list of numbers"),
        (None, [None] * 3, [None], "expected a list of numbers"),
        ([[1.0], 1, 2], [None, 1, 2], [0], r"gave \[1.0\]"),
    ],
)
def test_what_is_no_number_counts_as_none(gave, want, samples, said):
    judged = call(lambda completions: gave)
    assert [row[0] for row in values(judged)] == want
    assert [report.sample for report in judged.reports] == samples
    with pytest.raises(RewardError, match=said):
        call(lambda completions: gave, on_error="stop")


def test_a_failure_that_is_of_all_is_told_once():
    def broken(completions):
        raise RuntimeError("down")

    judged = call(broken)
    assert len(judged.reports) == 1 and judged.reports[0].sample is None and np.isnan(judged.values).all()


def test_what_the_table_says_itself_is_not_logged_beside_it():
    def logging(completions, log_extra):
        log_extra("reward", completions)
        return [0] * len(completions)

    (report,) = call(logging).reports
    assert "log_extra('reward'): the table of samples has step, prompt, " in report.problem


def test_an_async_function_that_takes_too_long():
    async def slow(completions):
        await asyncio.sleep(60)

    judged = call(slow, timeout=0.05)
    assert np.isnan(judged.values).all()
    assert [str(report) for report in judged.reports] == ["reward f0: no answer within 0.05 s"]


def test_a_column_that_is_not_there_is_the_runs_fault():
    with pytest.raises(RewardError, match="asks for 'gold', which is no column of the rows; they have answer"):
        call(lambda completions, gold: [0] * 3, columns={"answer": [1, 2, 3]})

    def graded(completions, gold):
        return [0] * 3

    with pytest.raises(RewardError, match=r"^graded asks for 'gold'"):
        call(graded)
    with pytest.raises(RewardError, match="no column 'answer'"):
        call(REWARDS["exact_match"].make(rewards.ExactMatch()))
    with pytest.raises(ValueError, match="column answer: got 2 values for 3 completions"):
        call(columns={"answer": [1, 2]})


def test_functions_of_a_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("import math\ndef good(completions):\n    return [math.sqrt(4)] * len(completions)\nnumber = 3\n")
    own, other = Own(function=f"{file}:good", weight=2.0), Own(function=f"{file}:good", on_error="stop", timeout=3.0)
    asked = rewards.made(REWARDS, [("function", own), ("regex", Pattern(pattern="a")), ("function", other)])
    assert [one.name for one in asked] == ["good", "regex", "good_2"]
    assert [one.weight for one in asked] == [2, 1, 1]
    assert asked[2].on_error == "stop" and asked[2].timeout == 3.0
    assert values(rewards.call(asked, ["p"] * 3, TEXTS, {})) == [[2, 1, 2], [2, 0, 2], [2, 0, 2]]
    file.write_text("def good(completions):\n    return 1 / 0\n")  # read anew
    asked = rewards.made(REWARDS, [("function", own)])
    report = rewards.call(asked, ["p"] * 3, TEXTS, {}).reports[0]
    assert report.reward == f"{file}:good" and report.problem == f"{file}, line 2: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("own.py", "expected file.py:name"),
        ("none.py:f", "no file none.py; expected the Python file that has f"),
        ("{file}:f", "has no function 'f'"),
        ("{broken}:f", "cannot be run: line 1: SyntaxError"),
        ("{raises}:f", "raises.py, line 2: RuntimeError: no"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, spec, said):
    (tmp_path / "own.py").write_text("f = 3\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("\nraise RuntimeError('no')\n")
    names = {"file": "own.py", "broken": "broken.py", "raises": "raises.py"}
    spec = spec.format(**{key: tmp_path / name for key, name in names.items()})
    with pytest.raises(ConfigError, match=r"`\w*\.?function`: ") as error:
        rewards.made(REWARDS, [("function", Own(function=spec))])
    assert said in str(error.value)


def test_every_setting_says_what_it_means():
    for name, entry in REWARDS.items():
        assert all(field.doc for field in fields.fields(entry.config)), name
        assert {"weight", "on_error"} <= {field.name for field in fields.fields(entry.config)}, name
