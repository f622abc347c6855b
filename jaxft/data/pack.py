"""Which tokens share a row: best-fit-decreasing packing (Ding et al. 2024, arXiv:2404.10830), wrapped streams, or one a
row.

A plan is made once from the lengths alone. An epoch only permutes which of the equally long examples fill a slot and
the order of the rows, so every epoch has the same number of rows and is known from (plan, seed, epoch) in one
vectorised step. The best fit is found in an integer used as a set of bits, one for each amount of free space: a shift
and a lowest set bit, instead of a tree.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxft.data.examples import Examples

BLOCK = 2**20
"""Tokens looked at together."""


@dataclass(frozen=True)
class Pieces:
    """Stretches `[start, stop)` of the token array, each within one example, and what making them cost; `group` of
    them in a row share a slot.

    `given`: of each, how many tokens of its example precede `start` that it shares with the stretch before it."""

    start: np.ndarray
    stop: np.ndarray
    truncated: int = 0
    cut_tokens: int = 0
    split: int = 0
    dropped_overlong: int = 0
    dropped_unlearnt: int = 0
    dropped_tokens: int = 0
    group: int = 1
    given: np.ndarray | None = None
    filled: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Numbers of the examples of which, cut, nothing is left to learn: their prompts fill the window."""

    def __len__(self) -> int:
        return len(self.start) // self.group

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each slot."""
        return together(np.add, self.stop - self.start, self.group)

    @property
    def shared(self) -> np.ndarray:
        """Tokens that stand once in each slot and twice in its sequences."""
        return np.zeros(len(self), np.int64) if self.given is None else together(np.add, self.given, self.group)

    @property
    def documents(self) -> np.ndarray:
        """Stretches in each slot that begin a document, before which a learnt prompt stands."""
        if self.given is None:
            return np.full(len(self), self.group)
        return together(np.add, (self.given == 0).astype(np.int64), self.group)

    def order(self, slots: np.ndarray) -> np.ndarray:
        """These slots, the longest first; of equally long ones first those that share more, then as they come."""
        return slots[np.lexsort((np.arange(len(slots)), -self.shared[slots], -self.lengths[slots]))]


@dataclass(frozen=True)
class Plan:
    """Slots sorted by length, longest first: row `r` holds slots `slots[offsets[r] : offsets[r + 1]]`.

    Each takes `reserved` positions more than its length for each of its stretches that begins a document."""

    pieces: Pieces
    capacity: int
    packing: str
    slots: np.ndarray
    offsets: np.ndarray
    reserved: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sequences(self) -> int:
        """The most stretches that a row holds."""
        return int(np.diff(self.offsets).max(initial=1)) * self.pieces.group

    @property
    def documents(self) -> int:
        """Stretches that begin a document, in all rows."""
        return int(self.pieces.documents.sum())

    @property
    def width(self) -> int:
        """The most positions that the sequences of a row have, each with its whole prompt, in any epoch."""
        found = self.pieces
        order = found.order(np.arange(len(found)))
        whole = (found.lengths + found.shared + self.reserved * found.group)[order][self.slots]
        return int(np.add.reduceat(whole, self.offsets[:-1]).max())


@dataclass(frozen=True)
class Epoch:
    """Rows of one epoch: row `r` is the stretches `[start[i], stop[i])` for `i` in `offsets[r] : offsets[r + 1]`; for
    `given` see `Pieces`."""

    start: np.ndarray
    stop: np.ndarray
    offsets: np.ndarray
    given: np.ndarray | None = None

    def precedes(self, i: int) -> int:
        """Tokens of stretch `i`'s document that the stretch before it has as well."""
        return 0 if self.given is None else int(self.given[i])


def pieces(examples: Examples, max_length: int, overlong: str) -> Pieces:
    """Cut examples to at most `max_length` tokens and leave out what has nothing to learn; everything is counted.

    What belongs together is left out together."""
    group = examples.group
    start, stop = examples.offsets[:-1], examples.offsets[1:]
    lengths = stop - start
    long = lengths > max_length
    counts = {"truncated": 0, "cut_tokens": 0, "split": 0, "dropped_overlong": 0, "dropped_tokens": 0}
    if overlong == "truncate":
        counts |= {"truncated": int(long.sum()), "cut_tokens": int((lengths - max_length)[long].sum())}
        stop = np.minimum(stop, start + max_length)
    elif overlong == "drop":
        long = apart(together(np.logical_or, long, group), group)
        counts |= {"dropped_overlong": int(long.sum()), "dropped_tokens": int(lengths[long].sum())}
        start, stop = start[~long], stop[~long]
    else:
        counts["split"] = int(long.sum())
        number = -(-lengths // max_length)
        first = np.repeat(np.cumsum(number) - number, number)
        start = np.repeat(start, number) + (np.arange(number.sum()) - first) * max_length
        stop = np.minimum(start + max_length, np.repeat(stop, number))
    # The first token of a piece has no predecessor there, so it is never a target.
    keep = counted(examples.loss if examples.steps is None else examples.steps, np.minimum(start + 1, stop), stop) > 0
    keep = apart(together(np.logical_and, keep, group), group)
    counts["dropped_tokens"] += int((stop - start)[~keep].sum())
    filled = np.flatnonzero(long & ~keep) if overlong == "truncate" else np.zeros(0, np.int64)
    unlearnt = int((~keep).sum())
    return Pieces(start[keep], stop[keep], **counts, dropped_unlearnt=unlearnt, group=group, given=None, filled=filled)


def left_unlearnt(examples: Examples, found: Pieces, count: int = 5) -> list[str]:
    """Where the first rows stand of whose examples, cut, nothing is left to learn."""
    rows = np.setdiff1d(examples.rows[found.filled], np.delete(examples.rows, found.filled))
    return [examples.source.rows(int(row), int(row) + 1)[0].where for row in rows[:count]]


def counted(flags: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """How many of `flags[start:stop]` are not zero, for each of these stretches. Flags may lie on disk: they are looked
    at block by block."""
    places = np.concatenate((start, stop))
    order, found, total = np.argsort(places, kind="stable"), np.zeros(len(places), np.int64), 0
    for low in range(0, len(flags), BLOCK):
        before = np.concatenate(([total], total + np.cumsum(flags[low : low + BLOCK] != 0)))
        first, last = np.searchsorted(places, (low, low + len(before) - 1), side="left", sorter=order)
        last = len(order) if low + BLOCK >= len(flags) else last
        found[order[first:last]] = before[places[order[first:last]] - low]
        total = int(before[-1])
    return found[len(start) :] - found[: len(start)]


def share(found: Pieces, completion: np.ndarray) -> Pieces:
    """Pairs whose prompts stand once: of the second is left the last token of the prompt, which predicts the first
    of the completion. `completion`: where that of each stretch begins; the tokens before it are those of both."""
    given: np.ndarray = np.maximum(completion - found.start - 1, 0)
    given[:: found.group] = 0
    return dataclasses.replace(found, start=found.start + given, given=given)


def together(combine: np.ufunc, values: np.ndarray, group: int) -> np.ndarray:
    """One value for every `group` in a row."""
    return values if group == 1 else combine.reduce(values.reshape(-1, group), axis=1)


def apart(values: np.ndarray, group: int) -> np.ndarray:
    """Each value `group` times in a row."""
    return values if group == 1 else np.repeat(values, group)


def plan(found: Pieces, capacity: int, packing: str, reserved: int = 0) -> Plan:
    """Assign slots to rows of `capacity` tokens, packed ones with `reserved` positions before each."""
    order = found.order(np.arange(len(found)))
    lengths = found.lengths[order]
    if packing == "none":
        return Plan(found, capacity, packing, np.arange(len(lengths)), np.arange(len(lengths) + 1), reserved)
    if packing == "wrapped":
        rows = -(-int(lengths.sum()) // capacity)
        return Plan(found, capacity, packing, np.arange(0), np.zeros(rows + 1, np.int64))
    row = best_fit((lengths + reserved * found.documents[order]).tolist(), capacity)
    counts = np.bincount(row, minlength=int(row.max(initial=-1)) + 1)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    return Plan(found, capacity, packing, np.argsort(row, kind="stable"), offsets, reserved)


def joined(plans: Sequence[Plan], shifts: Sequence[int]) -> Plan:
    """The rows of several plans one after the other, the tokens of each beginning at its shift; slots are sorted anew.

    For what holds of any row (how many there are, how wide they get); `epoch` is of each plan alone."""
    if len(plans) == 1:
        return plans[0]
    start, stop = (
        np.concatenate([getattr(plan.pieces, end) + shift for plan, shift in zip(plans, shifts, strict=True)])
        for end in ("start", "stop")
    )
    orders = [(plan.pieces, plan.pieces.order(np.arange(len(plan.pieces)))) for plan in plans]
    lengths, shared = (np.concatenate([getattr(p, n)[order] for p, order in orders]) for n in ("lengths", "shared"))
    place = np.empty(len(lengths), np.int64)
    place[np.lexsort((np.arange(len(lengths)), -shared, -lengths))] = np.arange(len(lengths))
    first = np.cumsum([0, *(len(plan.pieces) for plan in plans)])
    held = [0, *(len(plan.slots) for plan in plans)]
    slots = np.concatenate([plan.slots + begin for plan, begin in zip(plans, first, strict=False)])
    offsets = [plan.offsets[1:] + before for plan, before in zip(plans, np.cumsum(held), strict=False)]
    one = plans[0]
    given = [plan.pieces.given for plan in plans if plan.pieces.given is not None]
    made = Pieces(start, stop, group=one.pieces.group, given=np.concatenate(given) if given else None)
    slots = place[slots] if one.packing != "wrapped" else slots
    return Plan(made, one.capacity, one.packing, slots, np.concatenate(([0], *offsets)), one.reserved)


def best_fit(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """The row of each length (sorted, longest first): the fullest row that still has room, else a new one."""
    free = 0  # bit s is set when some row has s tokens free
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    chosen = np.empty(len(lengths), np.int64)
    count = 0
    for i, length in enumerate(lengths):
        fitting = free >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                free ^= 1 << space
        else:
            space, row = capacity, count
            count += 1
        chosen[i] = row
        if space > length:
            rows_with[space - length].append(row)
            free |= 1 << (space - length)
    return chosen


def epoch(made: Plan, seed: int, number: int, shuffle: bool) -> Epoch:
    """The rows of epoch `number`: a pure function of its arguments."""
    found = made.pieces
    keys = np.random.Philox(key=np.array([seed % 2**64, number], np.uint64))
    order = shuffled(keys, len(found)) if shuffle else np.arange(len(found))
    if made.packing == "wrapped":
        return wrap(found.start[order], found.stop[order], made.capacity, len(made))
    # Longest first, and equally long ones in shuffled order: slot i always has the i-th length.
    if made.packing == "best_fit":
        order = found.order(order)
    held = order[made.slots]
    if shuffle:
        rows = shuffled(keys, len(made))
    else:
        rows = np.argsort(np.minimum.reduceat(held, made.offsets[:-1]) if len(made) else held, kind="stable")
    counts = np.diff(made.offsets)[rows]
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    where = np.repeat(made.offsets[:-1][rows] - offsets[:-1], counts) + np.arange(len(held))
    held = apart(held[where], found.group) * found.group + np.tile(np.arange(found.group), len(held))
    given = None if found.given is None else found.given[held]
    return Epoch(found.start[held], found.stop[held], offsets * found.group, given)


def shuffled(keys: np.random.Philox, size: int) -> np.ndarray:
    """A permutation from raw random bits, whose stream numpy promises never to change."""
    return np.argsort(keys.random_raw(size), kind="stable")


def wrap(start: np.ndarray, stop: np.ndarray, capacity: int, rows: int) -> Epoch:
    """One stream of all stretches, chopped at every multiple of `capacity`."""
    ends = np.cumsum(stop - start)
    begins = ends - (stop - start)
    cuts = np.arange(1, rows) * capacity
    edges = np.union1d(np.concatenate(([0], ends)), cuts)
    piece = np.searchsorted(ends, edges[:-1], side="right")
    first = start[piece] + edges[:-1] - begins[piece]
    offsets = np.searchsorted(edges, np.concatenate(([0], cuts, edges[-1:])))
    return Epoch(first, first + np.diff(edges), offsets.astype(np.int64))


def places(rows: Epoch, first: int, count: int, before: int) -> list[tuple[int, int, int, int]]:
    """(row, place in the row, start, stop) of every stretch `[start, stop)` of tokens in `count` rows from `first` on,
    each that begins a document after `before` positions of no meaning."""
    found = []
    for row in range(min(count, len(rows.offsets) - 1 - first)):
        at = 0
        for i in range(rows.offsets[first + row], rows.offsets[first + row + 1]):
            start, stop = int(rows.start[i]), int(rows.stop[i])
            at += 0 if rows.precedes(i) else before
            found.append((row, at, start, stop))
            at += stop - start
    return found
