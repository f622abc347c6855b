"""Every source has its part at every moment, and a batch depends on its number alone."""

import numpy as np
import pytest

from jaxft.data.allot import Parts, Turns


def counts(turns, batches):
    """Rows of each source after each row, int [rows, sources]."""
    rows = [source for number in range(batches) for source in turns.batch(number)[0]]
    return np.cumsum(np.eye(turns.sources, dtype=int)[rows], axis=0)


@pytest.mark.parametrize("seed", range(6))
def test_no_source_is_ever_a_row_behind_or_ahead(seed):
    """Tijdeman's bound, 1 - 1/(2 S - 2), after every single row, for parts of any size."""
    rng = np.random.default_rng(seed)
    weights = rng.random(2 + seed) ** 4
    turns = Turns(Parts.of({0: weights.tolist()}), 7)
    had = counts(turns, 120)
    wanted = np.arange(1, len(had) + 1)[:, None] * weights / weights.sum()
    assert np.abs(had - wanted).max() <= 1 - 1 / (2 * len(weights) - 2) + 1e-6


def test_three_to_one():
    turns = Turns(Parts.of({0: [3, 1]}), 8)
    assert [sorted(turns.batch(i)[0]) for i in range(5)] == [[0] * 6 + [1] * 2] * 5
    assert turns.batch(5)[1] == (30, 10)


def test_a_batch_is_a_function_of_its_number():
    parts = Parts.of({0: [5, 2, 1], 30: [1, 1, 9]})
    turns = Turns(parts, 3)
    found = [turns.batch(i) for i in range(50)]
    assert [Turns(parts, 3).batch(i) for i in (49, 20)] == [found[49], found[20]]
    assert [turns.batch(i) for i in (7, 49, 0)] == [found[7], found[49], found[0]]
    rows = [source for chosen, _ in found[:49] for source in chosen]
    assert np.array_equal(np.bincount(rows, minlength=3), found[49][1])


def test_parts_move_in_a_straight_line():
    """By hand: from (1, 0, 1) to (1, 6, 1) in 20 steps, then to (0, 0, 1) at 40, where they stay."""
    parts = Parts.of({0: [1, 0, 1], 20: [1, 6, 1], 40: [0, 0, 2]})
    for batch, wanted in (
        (0, [0.5, 0, 0.5]),
        (10, [0.3125, 0.375, 0.3125]),
        (20, [0.125, 0.75, 0.125]),
        (30, [0.0625, 0.375, 0.5625]),
        (40, [0, 0, 1]),
        (1000, [0, 0, 1]),
    ):
        np.testing.assert_allclose(parts.at(batch), wanted)
    for batch in (1, 15, 33, 70):
        # float64 sums in two orders
        np.testing.assert_allclose(parts.before(batch), sum(parts.at(i) for i in range(batch)), rtol=1e-12)
    had = counts(Turns(parts, 5), 60)[4::5]
    np.testing.assert_allclose(had, [parts.before(i + 1) * 5 for i in range(60)], atol=1)
    assert had[-1][1] == had[39][1]  # none of a source whose part is 0


def test_weights_before_the_first_step_are_its_own():
    np.testing.assert_allclose(Parts.of({10: [1, 3], 20: [3, 1]}).at(0), [0.25, 0.75])
