"""Verdicts on sampled completions, by hand."""

import pytest

from jaxft.rollout import verify
from jaxft.rollout.verify import Sample, VerifyConfig


def verdicts(texts, columns=None, function=None, **settings):
    samples = [Sample(text, len(text), not text.endswith("...")) for text in texts]
    return verify.judged(VerifyConfig(**settings), "ask", samples, columns or {}, function)


def failed(texts, columns=None, function=None, **settings):
    return [verdict.failed for verdict in verdicts(texts, columns, function, **settings)]


def test_answers_are_compared_after_normalisation():
    said = ["Saturday", " saturday. ", "'Saturday'", "\uff33aturday", "Sunday", "It is Saturday", "", "Saturday..."]
    got = failed(said, {"answer": "Saturday"}, answer="answer")
    assert got == ["", "", "", "", "wrong answer", "wrong answer", "no final answer", "cut"]
    assert failed(["1,024", "1024.", "1,02,4"], {"n": 1024}, answer="n") == ["", "", "wrong answer"]
    assert failed(["Saturday..."], {"answer": "Saturday..."}, answer="answer", finished=False) == [""]
    with pytest.raises(ValueError, match="the row has None in column answer"):
        failed(["x"], {}, answer="answer")


def test_what_is_extracted_is_the_last_match():
    found = {"answer": "5", "extract": r"\\boxed\{(.*?)\}"}
    texts = [r"\boxed{3} no, \boxed{5}", r"\boxed{5} or \boxed{6}", "5", r"<think>\boxed{5}</think>six"]
    assert failed(texts, {"5": "5"}, **found) == ["", "wrong answer", "no answer found", "no answer found"]
    assert failed(["a 5 b 7"], {"5": 7}, answer="5", extract=r"\d+") == [""]


def test_reasoning_length_and_patterns():
    texts = ["<think>why</think>ok", "ok", "<think>long " + "x" * 50 + "</think>ok", "<think>no end"]
    assert failed(texts, reasoning="required", max_tokens=40) == ["", "no reasoning", "too long", "no final answer"]
    assert failed(texts[:2], reasoning="none") == ["reasoning", ""]
    assert failed(["<think>ok</think>no", "ok"], pattern="^ok$") == ["pattern", ""]


def test_a_function_of_the_users():
    asked = []

    def f(prompts, completions, task, answer):
        asked.append((prompts, completions, task, answer))
        return [None if text == "?" else len(text) / 4 for text in completions]

    columns = {"task": "t", "answer": "a", "prompt": "left out"}
    got = verdicts(["abcd", "a", "?"], columns, f)
    assert [(v.score, v.failed) for v in got] == [(1.0, ""), (0.25, "function"), (0.0, "not judged")]
    assert asked == [(["ask"] * 3, ["abcd", "a", "?"], ["t"] * 3, ["a"] * 3)]
    assert failed(["?"], columns, f, pattern="[?]") == [""]  # the pattern has judged it
    for wrong in ([1.0], ["x"] * 2, None, 1.0):
        with pytest.raises(ValueError, match="expected 2 numbers or None"):
            verdicts(["a", "b"], {}, lambda prompts, completions, wrong=wrong: wrong)


def test_what_is_kept():
    samples = [Sample(text, tokens, True) for text, tokens in (("bb", 5), ("a", 3), ("a ", 2), ("no", 1), ("c", 3))]
    passed = [verify.Verdict(score, "wrong answer" if score == 0 else "") for score in (1.0, 1.0, 1.0, 0.0, 2.0)]
    assert verify.kept(samples, passed, "first") == [0]
    assert verify.kept(samples, passed, "all") == [0, 1, 4]
    assert verify.kept(samples, passed, "best") == [4]
    assert verify.kept(samples[:4], passed[:4], "best") == [1]
    assert verify.kept(samples[3:4], passed[3:4], "best") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"extract": "("}, "which is no regex"),
        ({"extract": "a"}, "nothing to compare with"),
        ({"max_tokens": 0}, "at least 1"),
        ({"tags": ("", "x")}, "expected two texts"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(ValueError, match=said):
        VerifyConfig(**settings)
