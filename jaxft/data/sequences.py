"""Rows that hold whole sequences: which there are, what is known of each, and prompts with the completions of others.

The number of sequences that a row can hold is the same for all batches of a run, and so is the width of the mismatched
ones.
"""

import dataclasses

import numpy as np

from jaxft.data import pack
from jaxft.data.examples import Examples

Arrays = dict[str, np.ndarray]


def about(examples: Examples, rows: pack.Epoch, first: int, shape: tuple[int, int]) -> Arrays:
    """Rows from `first` on as arrays `[rows, sequences]`: `sequence_mask`, True where there is one, and the columns of
    the examples (`label`, `margin`).

    ``shape``: rows and the most sequences of one. Of a pair, a margin stands in the place of the chosen one."""
    found = {"sequence_mask": np.zeros(shape, bool)}
    found |= {name: np.zeros(shape, array.dtype) for name, array in examples.columns.items()}
    for row in range(min(shape[0], len(rows.offsets) - 1 - first)):
        for place, i in enumerate(range(rows.offsets[first + row], rows.offsets[first + row + 1])):
            example = examples.example_at(rows.start[i])
            found["sequence_mask"][row, place] = True
            for name, array in examples.columns.items():
                found[name][row, place] = array[example]
    if "margin" in found:
        found["margin"][:, 1 :: examples.group] = 0
    return found


def unfolded(rows: pack.Epoch, first: int, shape: tuple[int, int, int], before: int) -> Arrays:
    """Where attention finds the tokens of whole sequences in rows `[rows, T]` in which a pair's prompt stands once.

    `unfold` int32 `[rows, W]` is the token in each place of the whole sequences, one after the other, and
    `unfold_segments` its sequence, 0 where there is none; `fold` int32 `[rows, T]` is the place of each token, and
    `fold_again` that of its second copy, -1 where it has none. ``shape``: rows, T, W."""
    count, length, width = shape
    unfold, segments = np.zeros((count, width), np.int32), np.zeros((count, width), np.int32)
    fold, again = np.zeros((count, length), np.int32), np.full((count, length), -1, np.int32)
    for row in range(min(count, len(rows.offsets) - 1 - first)):
        at = place = begun = 0
        for number, i in enumerate(range(rows.offsets[first + row], rows.offsets[first + row + 1]), 1):
            given, size = rows.precedes(i), int(rows.stop[i] - rows.start[i])
            if given:  # the prompt of the sequence before, once more
                given += before
                unfold[row, place : place + given] = np.arange(begun, begun + given)
                again[row, begun : begun + given] = np.arange(place, place + given)
            else:
                begun, size = at, size + before
            end = place + given + size
            unfold[row, place + given : end] = np.arange(at, at + size)
            fold[row, at : at + size] = np.arange(place + given, end)
            segments[row, place:end] = number
            at, place = at + size, end
    return {"unfold": unfold, "unfold_segments": segments, "fold": fold, "fold_again": again}


def completions(examples: Examples, start: np.ndarray) -> np.ndarray:
    """Where the completion begins of each stretch that begins at `start`."""
    learnt = np.flatnonzero(examples.loss)
    return learnt[np.searchsorted(learnt, start)]


def mismatched(examples: Examples, rows: pack.Epoch, first: int, count: int, room: int) -> tuple[Examples, pack.Epoch]:
    """The prompts of a batch, each with the completion of the sequence before it (the first with the last one's), cut
    to `room` tokens; none where the batch holds a single sequence.

    What KTO estimates its KL from (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.2)."""
    last = min(first + count, len(rows.offsets) - 1)
    low, high = rows.offsets[first], rows.offsets[last]
    start, stop = rows.start[low:high], rows.stop[low:high]
    if len(start) == 1:
        start, stop = start[:0], stop[:0]
    begin = completions(examples, start)
    pieces = [
        np.concatenate((np.arange(a, b), np.arange(c, d)))[:room]
        for a, b, c, d in zip(start, begin, np.roll(begin, 1), np.roll(stop, 1), strict=True)
    ]
    where = np.concatenate(pieces or [np.zeros(0, np.int64)])
    offsets = np.concatenate(([0], np.cumsum([len(piece) for piece in pieces]))).astype(np.int64)
    tasks = np.array([examples.tasks[examples.example_at(a)] for a in start], np.int32)
    made = dataclasses.replace(
        examples,
        tokens=examples.tokens[where],
        loss=examples.loss[where],
        offsets=offsets,
        rows=np.arange(len(start)),
        tasks=tasks,
        columns={},
    )
    inner = np.minimum(rows.offsets[first : last + 1] - low, len(start))
    return made, pack.Epoch(offsets[:-1], offsets[1:], inner)


def mismatched_width(examples: Examples, plan: pack.Plan, room: int) -> int:
    """The most tokens that a row of mismatched sequences can hold, in any batch of any epoch.

    Within a row the completions of its own sequences stay, but for its last one's: another's comes in at its start."""
    found = plan.pieces
    longest = int((found.stop - completions(examples, found.start)).max())
    held = np.sort(found.lengths)[::-1][plan.slots] + plan.reserved
    fullest = int(np.add.reduceat(held, plan.offsets[:-1]).max())
    return min(fullest + longest, plan.sequences * (room + plan.reserved))
