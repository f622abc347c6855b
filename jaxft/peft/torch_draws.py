"""What torch's CPU generator draws for a seed, in numpy: adapters that store only the seed are then read exactly.

torch's generator is the Mersenne twister mt19937, seeded with 32 bits as numpy's `RandomState` is.
"""

import functools

import numpy as np

_LARGE = (2**32 - 1) // 20  # from this size on torch shuffles another way
_CHUNK = 2**22


def generator(seed: int) -> np.random.RandomState:
    """``torch.Generator().manual_seed(seed)``."""
    return np.random.RandomState(seed % 2**32)


def uniform(of: np.random.RandomState, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """``torch.empty(shape).uniform_(-bound, bound, generator=of)``, float32."""
    fraction = (_words(of, int(np.prod(shape))) % 2**24) * 2.0**-24
    low, high = np.float32(-bound), np.float32(bound)
    return (fraction * np.float64(high - low) + low).astype(np.float32).reshape(shape)


@functools.cache
def permutation(seed: int, size: int, count: int) -> np.ndarray:
    """``torch.randperm(size, generator=generator(seed))[:count]``, int64, in memory of ``count`` alone."""
    chosen = (_first if size < _LARGE else _last)(generator(seed), size, count)
    chosen.setflags(write=False)
    return chosen


def _first(of: np.random.RandomState, size: int, count: int) -> np.ndarray:
    """Step i exchanges entry i with itself or a later one, and then entry i stays as it is."""
    steps = min(count, size - 1)
    others = np.arange(steps) + _words(of, steps).astype(np.int64) % (size - np.arange(steps))
    moved: dict[int, int] = {}
    chosen = []
    for i, other in enumerate(others.tolist()):
        mine = moved.pop(i, i)
        chosen.append(moved.get(other, other) if other != i else mine)
        moved[other] = mine
    return np.array([*chosen, *(moved.get(i, i) for i in range(steps, count))], np.int64)


def _last(of: np.random.RandomState, size: int, count: int) -> np.ndarray:
    """Step i puts number i at a place up to i, and what was there at place i: of the later steps, those that hit the
    first ``count`` places matter."""
    chosen = np.arange(count)
    for start in range(0, size, _CHUNK):
        steps = np.arange(start, min(start + _CHUNK, size))
        high, low = _words(of, 2 * len(steps)).astype(np.uint64).reshape(-1, 2).T
        to = ((high << np.uint64(32) | low) % (steps + 1).astype(np.uint64)).astype(np.int64)
        for i, place in zip(steps[steps < count].tolist(), to.tolist(), strict=False):
            chosen[i], chosen[place] = chosen[place], i
        late = (to < count) & (steps >= count)
        chosen[to[late]] = steps[late]  # of several at one place the last one stays
    return chosen


def _words(of: np.random.RandomState, count: int) -> np.ndarray:
    """The generator's next 32-bit words."""
    return of.randint(0, 2**32, count, np.uint32)
