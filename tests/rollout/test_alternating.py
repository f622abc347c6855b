"""Batches of a student's own and of the data's, in turns that are drawn: how many of each, and that they go on."""

import numpy as np
import pytest

from jaxft.data import DataError
from jaxft.rollout.alternating import Alternating


class Count:
    """A loader, and a source of rollouts of three batches: batch i is (name, i)."""

    minibatches = 3

    def __init__(self, name):
        self.name, self.count = name, 0

    def __next__(self):
        self.count += 1
        return self.name, self.count

    def next(self, state):
        return self.__next__(), {"state": state}

    def state(self):
        return self.count

    def restore(self, state):
        self.count = state


def made(fraction=0.5, seed=0):
    return Alternating(Count("data"), Count("own"), fraction, seed)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_share_of_rollouts_is_the_students_own(fraction):
    """Each turn is three batches of one kind, and neither kind loses any."""
    source = made(fraction)
    found = [source.next(i) for i in range(3 * 400)]
    batches = [batch for batch, _ in found]
    turns = [batches[i : i + 3] for i in range(0, len(batches), 3)]
    assert all(len({name for name, _ in turn}) == 1 for turn in turns)
    own = np.mean([turn[0][0] == "own" for turn in turns])
    assert own == fraction if fraction in (0, 1) else abs(own - fraction) < 0.06
    for name in ("data", "own"):
        numbers = [number for kind, number in batches if kind == name]
        assert numbers == list(range(1, len(numbers) + 1))
    assert all(told == ({"state": i, "on_policy": 1.0} if batch[0] == "own" else {"on_policy": 0.0})
               for i, (batch, told) in enumerate(found))  # fmt: skip


@pytest.mark.parametrize("after", range(1, 9))
def test_it_goes_on_exactly_from_any_batch(after):
    whole, begun, again = made(seed=2), made(seed=2), made(seed=2)
    every = [whole.next(0) for _ in range(12)]
    assert {name for (name, _), _ in every} == {"own", "data"}
    for _ in range(after):
        begun.next(0)
    again.restore(begun.state())
    assert [again.next(0) for _ in range(12 - after)] == every[after:]
    with pytest.raises(DataError, match=r"rollout\.fraction"):
        made(0.25).restore(begun.state())
