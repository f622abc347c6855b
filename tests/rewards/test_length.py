"""Rewards of length and repetition, against trl's functions."""

import pytest
from trl.rewards import get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment

from jaxft.rewards import length
from jaxft.rewards.length import CosineLength, Repetition, SoftOverlong

LENGTHS = [0, 1, 2, 79, 80, 81, 90, 99, 100, 101, 500]


def given(function, ids, **columns):
    return function([""] * len(ids), [""] * len(ids), completion_ids=ids, **columns)


@pytest.mark.parametrize("cache", [0, 20, 100])
def test_soft_overlong(cache):
    ids = [[1] * n for n in LENGTHS]
    theirs = get_soft_overlong_punishment(100, cache)(ids)
    assert given(length.overlong(SoftOverlong(max_tokens=100, cache=cache)), ids) == theirs


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_repetition(ngram):
    ids = [[], [1], [1, 1], [1, 2, 3, 4], [5] * 5, [1, 2, 1, 2, 1, 3], [*range(3)] * 20]
    theirs = get_repetition_penalty_reward(ngram, -0.7)(ids)
    assert any(theirs)
    ours = given(length.repetition(Repetition(ngram=ngram, max_penalty=-0.7)), ids)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_cosine():
    pytest.importorskip("math_verify")
    texts = [rf"$\boxed{{{3 if i % 2 else 4}}}$" for i in range(2 * len(LENGTHS))]
    ids = [[1] * n for n in LENGTHS for _ in range(2)]
    theirs = get_cosine_scaled_reward(100, -0.9, -0.4, 0.3, 1.2)(
        [[{"content": text}] for text in texts], ["$3$"] * len(texts), ids
    )
    config = CosineLength(
        max_tokens=100, shortest_wrong=-0.9, longest_wrong=-0.4, longest_right=0.3, shortest_right=1.2, algebra="none"
    )
    columns = {"completion_ids": ids, "solution": ["3"] * len(texts)}
    ours = length.cosine(config)([""] * len(texts), texts, **columns)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert length.cosine(config)([""], ["3"], completion_ids=[[1]], solution=[None]) == [None]


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SoftOverlong, {"max_tokens": 10, "cache": 11}),
        (Repetition, {"ngram": 0}),
        (Repetition, {"max_penalty": 0.5}),
        (CosineLength, {"max_tokens": 0}),
    ],
)
def test_settings_that_make_no_sense(cls, settings):
    with pytest.raises(ValueError, match="expected"):
        cls(**settings)
