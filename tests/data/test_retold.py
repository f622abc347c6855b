"""A student's rows told again in a teacher's tokens: the same documents, in rows as wide in every epoch."""

import dataclasses

import numpy as np
import pytest

from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.examples import Examples, Reading
from jaxft.data.loader import Loader
from jaxft.data.records import Row
from jaxft.data.retold import Retold

ROOM = 16


class Source:
    """Rows by number."""

    def rows(self, start, stop):
        return [Row({}, f"a.jsonl:{i + 1}") for i in range(start, stop)]


def told(rows, lengths, first, pad=0):
    """Examples of these rows, whose tokens count from ``first``; their second half is learnt."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = first + np.arange(offsets[-1], dtype=np.int32)
    loss = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    rows = np.asarray(rows)
    return Examples(tokens, loss, offsets, rows, rows * 0, pad, Source(), Reading())


def both(count=40):
    """Row 3 has two examples for either; the teacher also read row 100, and has them in another order."""
    rng = np.random.default_rng(0)
    rows = sorted([*range(count), 3])
    own = told(rows, rng.integers(2, 20, len(rows)), 1000)
    order = [*rng.permutation(len(rows))]
    order.remove(3), order.remove(4)
    order = [3, *order, 4]  # equal rows stay in order
    other = told([*(rows[i] for i in order), 100], rng.integers(2, 24, len(rows) + 1), 5000, pad=7)
    return own, other, {i: at for at, i in enumerate(order)}


@pytest.mark.parametrize(("packing", "reserved"), [("best_fit", 0), ("best_fit", 2), ("none", 0)])
def test_every_document_stands_beside_itself(packing, reserved):
    own, other, place = both()
    config = DataConfig("x", max_length=ROOM + reserved, packing=packing, length_multiple=4)
    loader = Loader(own, config, batch_rows=5, reserved=reserved, beside=Retold(other))
    widths, seen = set(), []
    for number in range(3 * loader.batches_per_epoch):
        batch = loader.batch(number)
        widths.add(batch["teacher_tokens"].shape[1])
        segments = batch["teacher_segments"]
        assert (batch["teacher_tokens"][segments == 0] == 7).all() and not batch["teacher_loss_mask"][
            segments == 0
        ].any()
        for row, mine in enumerate(batch.get("segments", (batch["tokens"] > 0).astype(int))):
            assert segments[row].max() == mine.max()
            for segment in range(1, mine.max() + 1):
                first = batch["tokens"][row][mine == segment][reserved]
                example = own.example_at(first - 1000)
                seen.append(example)
                start, stop = other.offsets[place[example] : place[example] + 2]
                stop = min(stop, start + ROOM)
                here = segments[row] == segment
                assert batch["teacher_tokens"][row][here].tolist() == other.tokens[start:stop].tolist()
                assert batch["teacher_positions"][row][here].tolist() == [*range(stop - start)]
                assert batch["teacher_loss_mask"][row][here].tolist() == [False, *other.loss[start + 1 : stop]]
    assert sorted(seen) == sorted([*range(len(own))] * 3) and len(widths) == 1
    (width,) = widths
    assert width % 4 == 0 and (width == ROOM if packing == "none" else ROOM <= width <= 4 * ROOM)


def test_what_cannot_be_told_again_is_refused():
    own, other, _ = both()
    config = DataConfig("x", max_length=ROOM, packing="best_fit")
    for name, value in (("packing", "wrapped"), ("overlong", "split")):
        with pytest.raises(DataError, match=f"data.{name}.*{value}"):
            Loader(own, dataclasses.replace(config, **{name: value}), batch_rows=2, beside=Retold(other))
    fewer = told([*range(10), *range(12, 40)], [5] * 38, 5000)
    with pytest.raises(DataError, match=r"a.jsonl:4: got .* none for 3 of 41 examples"):  # row 3's second, 10 and 11
        Loader(own, config, batch_rows=2, beside=Retold(fewer))
