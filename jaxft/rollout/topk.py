"""A teacher's likeliest tokens at every place of a data set, found once and stored: `data.topk` says how.

Documents of about equal length share a batch, so that little is computed for padding; their widths are few, as each is
a program of its own.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.core import tree
from jaxft.data import topk
from jaxft.data.examples import Examples
from jaxft.data.topk import About
from jaxft.models import decoder, divergences, heads
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.objectives.terms import Batch
from jaxft.rollout import score

LEAST_WIDTH = 32


def make_top(
    config: ModelConfig,
    count: int,
    *,
    dtype: Any,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    execution: Execution = decoder.DEFAULT,
) -> Callable[[tree.Params, Batch], dict[str, jax.Array]]:
    """Builds ``top(params, batch) -> {ids: int32[B, T, count], logp: float32[B, T, count]}``: the ``count`` likeliest
    tokens in the place of each token, given what precedes it, likeliest first; 0 where none precedes it.

    For ``vocabulary`` see `divergences.top`."""

    def top(params: tree.Params, batch: Batch) -> dict[str, jax.Array]:
        params = tree.cast(params, dtype)
        hidden_BTD, _ = score.states(config, params, batch, execution=execution)
        how = {"temperature": temperature, "vocabulary": vocabulary, "mesh": execution.mesh}
        out = divergences.top(config, heads.head_of(config, params), hidden_BTD, count, **how)
        return score.aligned(out, params, batch)

    return top


def store(
    folder: str | Path,
    examples: Examples,
    of: About,
    top: Callable[[dict[str, np.ndarray]], Mapping[str, Any]],
    *,
    batch_tokens: int = 16384,
    rows: int = 1,
    told: Callable[[int, int], None] = lambda done, files: None,
) -> None:
    """Finds and writes what is not yet in ``folder``; begun before, it goes on.

    Args:
      of: `data.topk.about` of the examples.
      top: a batch of numpy arrays, tokens and segments int32[B, T], to ids and logp [B, T, K]: `make_top`, compiled.
      batch_tokens: of a batch, at most, where its rows allow.
      rows: B is a multiple of it, such as the data shards of a mesh.
      told: called with the number of files done and that of all.

    Raises DataError for a folder that holds anything else."""
    folder = Path(folder)
    edges, left = topk.begin(folder, of, topk.starts(examples))
    for done, number in enumerate(left, len(edges) - 1 - len(left)):
        told(done, len(edges) - 1)
        begin, end = edges[number : number + 2]
        ids = np.zeros((end - begin, of.count), np.int32)
        logp = np.zeros((end - begin, of.count), np.float32)
        for starts, stops, batch in _batches(examples, begin, end, of.window, batch_tokens, rows):
            found = {name: np.asarray(value) for name, value in top(batch).items()}
            for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                here = slice(start - begin, stop - begin)
                ids[here], logp[here] = (found[name][row, : stop - start] for name in ("ids", "logp"))
        topk.write(folder, number, ids, logp)
    told(len(edges) - 1, len(edges) - 1)


def _batches(
    examples: Examples, begin: int, end: int, window: int, batch_tokens: int, rows: int
) -> Iterator[tuple[list[int], list[int], dict[str, np.ndarray]]]:
    """The documents of tokens ``[begin, end)``, none longer than ``window``, in rows right-padded to a few widths."""
    offsets = examples.offsets[(examples.offsets >= begin) & (examples.offsets <= end)].tolist()
    spans = [
        (start, min(start + window, stop))
        for first, stop in itertools.pairwise(offsets)
        for start in range(first, stop, window)
    ]
    by_width: dict[int, list[tuple[int, int]]] = {}
    for start, stop in spans:
        width = min(max(LEAST_WIDTH, 1 << (stop - start - 1).bit_length()), max(window, LEAST_WIDTH))
        by_width.setdefault(width, []).append((start, stop))
    for width, held in sorted(by_width.items()):
        size = max(batch_tokens // width // rows, 1) * rows
        for at in range(0, len(held), size):
            part = held[at : at + size]
            tokens, segments = np.zeros((size, width), np.int32), np.zeros((size, width), np.int32)
            for row, (start, stop) in enumerate(part):
                tokens[row, : stop - start], segments[row, : stop - start] = examples.tokens[start:stop], 1
            yield [start for start, _ in part], [stop for _, stop in part], {"tokens": tokens, "segments": segments}
