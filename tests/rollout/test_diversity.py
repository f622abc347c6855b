"""Diversity of completions, by hand and by the definition of BLEU."""

import math
from collections import Counter

import numpy as np
import pytest

from jaxft.rollout import diversity


def bleu(hypothesis, references):
    """BLEU-4 of one hypothesis as Papineni et al. 2002 define it, with method 1 of Chen and Cherry 2014."""
    log = 0.0
    for n in (1, 2, 3, 4):
        grams = lambda ids: Counter(zip(*(ids[i:] for i in range(n)), strict=False))  # noqa: B023, E731
        counts = grams(hypothesis)
        clipped = {gram: min(count, max(grams(r)[gram] for r in references)) for gram, count in counts.items()}
        matches, total = sum(clipped.values()), max(1, len(hypothesis) - n + 1)
        if n == 1 and not matches:
            return 0.0
        log += 0.25 * math.log((matches if matches else 0.1) / total)
    length = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    return math.exp(log) * (1.0 if len(hypothesis) > length else math.exp(1 - length / len(hypothesis)))


def test_self_bleu_is_the_mean_of_each_against_the_others():
    rng = np.random.default_rng(0)
    for vocabulary, longest in ((3, 12), (8, 7), (30, 20)):
        said = [rng.integers(0, vocabulary, rng.integers(1, longest)).tolist() for _ in range(9)]
        said += [said[0], [99, 98], [97]]  # one twice, and two of which no other has a token
        want = np.mean([bleu(ids, said[:i] + said[i + 1 :]) for i, ids in enumerate(said)])
        assert diversity.self_bleu(said) == pytest.approx(want, rel=1e-12)


def test_by_hand():
    """7 tokens, 3 of them different, and 3 different pairs: 12, 21 and 23. What is empty counts nowhere."""
    found = diversity.metrics([[1, 2, 1, 2], [], [1, 2, 3]])
    assert found["completions/distinct_1"] == pytest.approx(3 / 7)
    assert found["completions/distinct_2"] == pytest.approx(3 / 7)
    same = diversity.metrics([[1, 2, 3, 4, 5]] * 3)
    assert same["completions/self_bleu"] == pytest.approx(1.0) and same["completions/distinct_1"] == pytest.approx(
        1 / 3
    )
    assert diversity.metrics([[], []]) == {} and "completions/self_bleu" not in diversity.metrics([[1]])
