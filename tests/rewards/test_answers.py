"""Where a completion's reasoning ends and its final answer begins."""

import pytest

from jaxft.rewards import answers


@pytest.mark.parametrize(
    ("text", "reasoning", "final"),
    [
        ("<think>\n2 and 2\n</think>\n\n4", "2 and 2", "4"),
        ("2 and 2\n</think>4", "2 and 2", "4"),  # the template wrote the first tag
        ("4", "", "4"),
        ("<think>2 and", "2 and", None),
        ("<think>a</think> b <think>c</think>", "a</think> b <think>c", ""),
    ],
)
def test_reasoning_and_the_final_answer(text, reasoning, final):
    assert answers.parts(text) == (reasoning, final)
