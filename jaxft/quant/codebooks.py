"""The numbers that few bits stand for, as bitsandbytes defines them.

A value between two entries of an ascending codebook goes to the nearer one, and to the lower one half way: the index is
the number of midpoints strictly below it.
"""

import functools
from typing import NamedTuple

import numpy as np

NORMAL = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FLOAT = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)


class Codebook(NamedTuple):
    """A table of values, and how a number finds its index in it."""

    values: np.ndarray
    """float32[n] by index."""
    order: np.ndarray
    """int32[n]: the indices by ascending value."""
    midpoints: np.ndarray
    """float32[n - 1] between neighbours in that order."""


def codebook(values: np.ndarray) -> Codebook:
    """The codebook of some values, in the order of their indices."""
    order = np.argsort(values, kind="stable").astype(np.int32)
    ascending = values.astype(np.float32)[order]
    return Codebook(values.astype(np.float32), order, (ascending[:-1] + ascending[1:]) / np.float32(2))


@functools.cache
def four_bit(kind: str) -> Codebook:
    """``nf4``: quantiles of a normal distribution (Dettmers et al. 2023, appendix E, arXiv:2305.14314); ``fp4``: a
    sign, two bits of exponent and one of mantissa, divided by 12."""
    return codebook(np.asarray(NORMAL if kind == "nf4" else [*FLOAT, *(-v for v in FLOAT)], np.float32))


@functools.cache
def dynamic(signed: bool = True) -> Codebook:
    """The 8-bit dynamic data type: 256 values with an exponent of variable length (Dettmers 2016, arXiv:1511.04561).

    For i in 0..6 the midpoints of 2^i (unsigned: 2^(i+1)) equal bins of [0.1, 1] times 10^(i-6), both signs; 0; 1."""
    found = [np.float32(0), np.float32(1)]
    for i in range(7):
        middles = np.float32(10.0 ** (i - 6)) * _middles(2 ** (i + (not signed)))
        found += [*middles, *(-middles if signed else ())]
    return codebook(np.sort(np.asarray(found, np.float32)))


def _middles(n: int) -> np.ndarray:
    """float32[n]: the midpoints of n equal bins of [0.1, 1], counted from both ends, as torch.linspace rounds them."""
    low, high, i = np.float32(0.1), np.float32(1.0), np.arange(n + 1.0)
    step = np.float64((high - low) / np.float32(n))
    edges = np.where(i < (n + 1) // 2, low + step * i, high - step * (n - i)).astype(np.float32)
    return (edges[:-1] + edges[1:]) / np.float32(2)
