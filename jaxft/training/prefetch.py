"""Batches on the device ahead of the step, each with the cursor of the data behind it.

The loader runs ahead of training, so its own cursor is too far on to be saved. Each batch carries the one taken right
after it was read; a checkpoint saves that of the last batch *consumed*.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Host = Mapping[str, np.ndarray]
Place = Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]]
"""Host arrays [accumulate, rows, ...] to the device or the mesh."""


class Loader(Protocol):
    """Batches of ``rows * accumulate`` rows, and a cursor in JSON."""

    def __next__(self) -> Any: ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Item(NamedTuple):
    """A batch on its way to the step."""

    device: Mapping[str, jax.Array]
    host: Host
    cursor: Any


def split(batch: Host, accumulate: int) -> dict[str, np.ndarray]:
    """[rows, ...] -> [accumulate, rows / accumulate, ...]. Raises ValueError if it does not divide."""
    for name, value in batch.items():
        if value.shape[0] % accumulate:
            raise ValueError(
                f"train.accumulate={accumulate} does not divide the {value.shape[0]} rows of `{name}`; the loader must "
                "make train.batch * train.accumulate rows"
            )
    return {n: v.reshape(accumulate, v.shape[0] // accumulate, *v.shape[1:]) for n, v in batch.items()}


def ahead(loader: Loader, accumulate: int, place: Place, depth: int) -> Iterator[Item]:
    """Items in order, at least ``depth`` of them already sent to the device when one is asked for."""
    waiting: collections.deque[Item] = collections.deque()

    def read() -> bool:
        try:
            host = next(loader)
        except StopIteration:
            return False
        waiting.append(Item(place(split(host, accumulate)), host, loader.state()))
        return True

    more = True
    while more or waiting:
        while more and len(waiting) <= depth:
            more = read()
        if waiting:
            yield waiting.popleft()
