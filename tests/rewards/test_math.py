"""Mathematical answers: where they stand, when they are equal, and against trl's reward."""

import threading

import pytest

import jaxft.rewards
from jaxft.rewards import answers, math, numbers
from jaxft.rewards.math import Math


def judged(texts, golds, **settings):
    return math.make(Math(**settings))([""] * len(texts), texts, answer=golds)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{x : x^{2}\right\}} end", r"\left\{x : x^{2}\right\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\fbox{7}", "7"),
        ("5", None),
    ],
)
def test_what_is_boxed(text, found):
    assert answers.boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 5, or 1,234.50 dollars.", "1,234.50"),
        ("-3 or 3/4.", "3/4"),
        ("from 2-3", "3"),
        ("x1 and v2.0", None),
        ("by 12.5%", "12.5%"),
        ("1, 2, 3", "3"),
        ("6.02e23 of them", "6.02e23"),
    ],
)
def test_the_last_number(text, found):
    assert answers.last_number(text) == found


EQUAL = [
    ("1/3", r"\frac{1}{3}"), (r"\dfrac12", "0.5"), ("1,000", "1000"), ("5 cm", "5"), (r"5\text{ cm}", "5 cm"),
    ("50%", "0.5"), (r"50\%", "50"), ("50 percent", "50%"), ("x = 5", "5"), ("-\\frac{3}{4}", "-0.75"),
    (r"1\frac{1}{2}", "1.5"), ("$5", "5"), (r"3.0 \times 10^{8}", "300000000"), ("(1, 2)", r"\left(1,2\right)"),
    (r"\{1, 2\}", r"\{2, 1\}"), ("(0.5, 1)", r"(\frac{1}{2}, 1)"), ("Saturday.", "saturday"), ("\u22122", "-2"),
    ("90^\\circ", "90"), ("3.1415926", "3.1415927"), ("5 m^2", "5"), ("7.", "7"), ("½", "0.5"),
]  # fmt: skip
DIFFERENT = [
    ("1/3", "0.33"), ("5", "6"), ("5x", "5"), ("1,2", "12"), ("(1,2)", "(2,1)"), ("[1,2)", "(1,2)"), ("5 cm", "5 kg"),
    ("2 million", "2"), ("5 pi", "5"), ("3²", "32"), ("", "0"), ("50%", "5"), ("1e999999999", "2"), ("1/0", "1"),
    (r"\{1,1\}", r"\{1,2\}"), ("9" * 5000, "9"), ("3.14", "3.1416"),
]  # fmt: skip


@pytest.mark.parametrize("pair", EQUAL)
def test_equal_answers(pair):
    assert numbers.same(*pair, 1e-6) and numbers.same(*pair[::-1], 1e-6)


@pytest.mark.parametrize("pair", DIFFERENT)
def test_different_answers(pair):
    assert not numbers.same(*pair, 1e-6) and not numbers.same(*pair[::-1], 1e-6)


def test_a_tolerance_is_relative_to_the_right_answer():
    assert numbers.same("101", "100", 0.01) and not numbers.same("101.1", "100", 0.01)
    assert numbers.same("-0.0101", "-0.01", 0.01)


def test_completions_are_judged_by_their_final_answer():
    texts = [r"It is \boxed{4}", "<think>5</think>It is 4.", "<think>4", "four", r"\boxed{5} or 4", "#### 4\nand 9"]
    assert judged(texts, ["4"] * 6, algebra="none") == [1, 1, 0, 0, 0, 1]
    assert judged(texts, [4] * 6, algebra="none", extract="number") == [1, 1, 0, 0, 1, 0]
    assert judged(texts, [4.0] * 6, algebra="none", extract="boxed") == [1, 0, 0, 0, 0, 0]
    golds = ["work 3 + 1 = 4\n#### 4", r"thus $\boxed{4}$", None, " "]
    assert judged(["4"] * 4, golds, algebra="none") == [1, 1, None, None]
    assert math.make(Math(algebra="none"))([""], ["4"], solution=["4"]) == [1]
    with pytest.raises(ValueError, match="no column 'answer'; they have gold"):
        math.make(Math(algebra="none"))([""], ["4"], gold=["4"])
    with pytest.raises(ValueError, match="expected text or a number"):
        judged(["4"], [["4"]], algebra="none")


@pytest.mark.parametrize("settings", [{"tolerance": -1.0}, {"timeout": 0.0}, {"tags": ("", "a")}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Math(**settings)


GOLD_AND_SAID = [
    (r"\frac{1}{3}", r"\frac{2}{6}"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2+1", "1+x^2"), (r"\frac{\pi}{2}", r"\pi/2"),
    (r"\sqrt{8}", r"\sqrt{7}"), ("(1, 2)", "(2, 1)"), (r"\{1,2,3\}", r"\{3,2,1\}"), ("12", "13"), ("[0, 1)", "[0, 1]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("(x+1)^2", "x^2+2x+1"), ("e^2", "e"),
]  # fmt: skip


def test_algebra_agrees_with_trl():
    """Whole completions against `trl.rewards.accuracy_reward`, which asks math-verify for all of them."""
    pytest.importorskip("math_verify")
    from trl.rewards import accuracy_reward

    golds = [rf"${gold}$" for gold, _ in GOLD_AND_SAID]
    texts = [rf"So the answer is $\boxed{{{said}}}$." for _, said in GOLD_AND_SAID]
    theirs = accuracy_reward([[{"role": "assistant", "content": text}] for text in texts], golds)
    assert {*theirs} == {0.0, 1.0}
    ours: list = []
    thread = threading.Thread(target=lambda: ours.extend(judged(texts, golds, algebra="math_verify")))
    thread.start()  # where there are no alarms
    thread.join()
    assert ours == theirs


def test_an_expression_that_takes_for_ever_is_wrong():
    pytest.importorskip("math_verify")
    texts = [r"\boxed{9^{9^{9^{9}}} + x}", r"\boxed{y+x}"]
    assert judged(texts, ["x+y"] * 2, timeout=1.0) == [0, 1]


def test_words_are_no_products_of_letters():
    assert judged(["\\boxed{listen}"], ["silent"]) == [0]


def test_the_table_has_it():
    entry = jaxft.rewards.REWARDS["math"]
    assert entry.make(entry.config(algebra="none"))([""], ["4"], answer=["4"]) == [1]
