"""Batches on the device, each with the cursor of the data behind it: ahead of the step, or when it is asked for.

A loader runs ahead of training, so its own cursor is too far on to be saved. Each batch carries the one taken right
after it was read; a checkpoint saves that of the last batch *consumed*. What the policy itself makes is not made before
the step that it depends on: its source is shown the state, and asked for one batch at a time.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
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


class Source(Protocol):
    """Batches that depend on the state of the run, and a cursor: JSON, with arrays where a number does not do."""

    def next(self, state: Any) -> tuple[Any, Mapping[str, float]]:
        """A batch for the step from this state, and what there is to log of how it was made."""
        ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Item(NamedTuple):
    """A batch on its way to the step."""

    device: Mapping[str, jax.Array]
    host: Host
    cursor: Any
    metrics: Mapping[str, float] = MappingProxyType({})
    """What its source has to say of it."""


Read = Callable[[Any], Item | None]
"""``state -> the next item``; None: there are no more."""


def split(batch: Host, accumulate: int) -> dict[str, np.ndarray]:
    """[rows, ...] -> [accumulate, rows / accumulate, ...]. Raises ValueError if it does not divide."""
    for name, value in batch.items():
        if value.shape[0] % accumulate:
            raise ValueError(
                f"train.accumulate={accumulate} does not divide the {value.shape[0]} rows of `{name}`; the loader must "
                "make train.batch * train.accumulate rows"
            )
    return {n: v.reshape(accumulate, v.shape[0] // accumulate, *v.shape[1:]) for n, v in batch.items()}


def ahead(loader: Loader, accumulate: int, place: Place, depth: int) -> Read:
    """Items in order, at least ``depth`` of them already sent to the device when one is asked for."""
    items = _ahead(loader, accumulate, place, depth)
    return lambda state: next(items, None)


def as_asked(source: Source, accumulate: int, place: Place, depth: int) -> Read:
    """Items of a source, none before the step that it is for; ``depth`` has no meaning here."""
    del depth

    def read(state: Any) -> Item:
        host, metrics = source.next(state)
        return Item(place(split(host, accumulate)), host, source.state(), metrics)

    return read


def _ahead(loader: Loader, accumulate: int, place: Place, depth: int) -> Iterator[Item]:
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
