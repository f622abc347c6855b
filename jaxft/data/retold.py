"""Examples told again in the tokens of a teacher with another tokenizer, beside a student's.

Both are made of the same rows by the same settings: `prepare` with the one tokenizer and with the other. To an example
belongs the one of the same number among those of its row. A batch's sequences are told again in its own rows, one
after the other: `teacher_tokens`, `teacher_positions`, `teacher_segments` int32 and `teacher_loss_mask` bool, `[rows,
W]`, with a W that every batch of every epoch fits in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxft.data import pack
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.examples import Examples

Beside = Callable[[pack.Epoch, int, tuple[int, int]], dict[str, np.ndarray]]
"""``(rows, first, shape) -> arrays``: what stands beside a batch of so many rows and tokens, rows from ``first`` on."""


@dataclass(frozen=True)
class Retold:
    """The examples in the teacher's tokens."""

    examples: Examples

    def beside(self, own: Examples, plan: pack.Plan, room: int, config: DataConfig) -> Beside:
        """For the student's examples as they are packed; of either, documents end after `room` tokens.

        Raises DataError for an example that the teacher's have not, and for documents that are continued in others."""
        for name, value, bad in (("packing", config.packing, "wrapped"), ("overlong", config.overlong, "split")):
            if value == bad:
                got, expected = f"{bad}, with a teacher of another tokenizer", "documents that begin where they begin"
                remedy = f"Set data.{name}={'best_fit' if bad == 'wrapped' else 'truncate'}."
                raise DataError("", f"data.{name}", got, expected, remedy)
        match = counterparts(own, self.examples)
        lengths = np.minimum(np.diff(self.examples.offsets)[match], room)
        width = -(-widest(own, plan, lengths) // config.length_multiple) * config.length_multiple

        def arrays(rows: pack.Epoch, first: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
            return self._arrays(own, match, lengths, rows, first, (shape[0], width))

        return arrays

    def _arrays(
        self,
        own: Examples,
        match: np.ndarray,
        lengths: np.ndarray,
        rows: pack.Epoch,
        first: int,
        shape: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        tokens, loss = np.full(shape, self.examples.pad_id, np.int32), np.zeros(shape, bool)
        positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row in range(min(shape[0], len(rows.offsets) - 1 - first)):
            at = 0
            for number, i in enumerate(range(rows.offsets[first + row], rows.offsets[first + row + 1]), 1):
                example = own.example_at(rows.start[i])
                start, end = self.examples.offsets[match[example]], at + lengths[example]
                tokens[row, at:end] = self.examples.tokens[start : start + end - at]
                loss[row, at:end] = self.examples.loss[start : start + end - at]
                loss[row, at] = False  # nothing precedes it
                positions[row, at:end], segments[row, at:end] = np.arange(end - at), number
                at = end
        arrays = {"tokens": tokens, "positions": positions, "segments": segments, "loss_mask": loss}
        return {f"teacher_{name}": array for name, array in arrays.items()}


def counterparts(own: Examples, other: Examples) -> np.ndarray:
    """For each example the other one of the same number among those of its row. Raises DataError if there is none."""
    names = [_named(examples) for examples in (own, other)]
    place = {name: i for i, name in enumerate(names[1])}
    lost = [name for name in names[0] if name not in place]
    if lost:
        row = own.source.rows(lost[0][0], lost[0][0] + 1)[0]
        got = f"in the teacher's tokens none for {len(lost)} of {len(own)} examples, of which this is the first"
        remedy = "Leave out of the data what only one of the two tokenizers and templates can read."
        raise DataError(row.where, "", got, "the same examples in both", remedy)
    return np.array([place[name] for name in names[0]], np.int64)


def _named(examples: Examples) -> list[tuple[int, int]]:
    """The row of each example, and its number in it."""
    seen: dict[int, int] = {}
    found = []
    for row in examples.rows.tolist():
        seen[row] = seen.get(row, -1) + 1
        found.append((row, seen[row]))
    return found


def widest(own: Examples, plan: pack.Plan, lengths: np.ndarray) -> int:
    """The most of the teacher's tokens that a row can hold, whichever of equally long documents fill its slots."""
    size = plan.pieces.stop - plan.pieces.start
    told = lengths[np.searchsorted(own.offsets, plan.pieces.start, side="right") - 1]
    most = np.zeros(int(size.max()) + 1, np.int64)
    np.maximum.at(most, size, told)
    in_slots = most[np.sort(size)[::-1]][plan.slots]
    return int(np.add.reduceat(in_slots, plan.offsets[:-1]).max())
