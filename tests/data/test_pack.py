"""Packing: nothing lost, nothing mixed, and as tight as TRL's."""

import time

import numpy as np
import pytest

from jaxft.data import pack
from jaxft.data.examples import Examples, Reading
from jaxft.data.loader import assemble


def make_examples(lengths, learnt=None):
    """Examples whose tokens are all different, so that a token names its place; all learnt unless told."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    size = int(offsets[-1])
    loss = np.ones(size, bool) if learnt is None else learnt
    numbers = np.arange(len(lengths))
    return Examples(np.arange(1, size + 1, dtype=np.int32), loss, offsets, numbers, numbers * 0, 0, None, Reading())


def some_lengths(number, high, seed=0):
    return np.random.default_rng(seed).geometric(4 / high, number).clip(2, 2 * high)


def batch_of(examples, capacity, packing, overlong="truncate", max_length=None, epoch=0, shuffle=True, seed=3):
    found = pack.pieces(examples, 2**62 if packing == "wrapped" else max_length or capacity, overlong)
    plan = pack.plan(found, capacity, packing)
    rows = pack.epoch(plan, seed, epoch, shuffle)
    return plan, assemble(examples, rows, 0, (len(plan), capacity), packing == "best_fit")


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
@pytest.mark.parametrize("seed", range(5))
def test_best_fit_loses_and_mixes_nothing(seed, overlong):
    capacity = 64
    examples = make_examples(some_lengths(300, capacity, seed))
    plan, batch = batch_of(examples, capacity, "best_fit", overlong, epoch=seed)
    tokens, segments, positions = batch["tokens"], batch["segments"], batch["positions"]
    assert tokens.shape == (len(plan), capacity)
    starts, stops = examples.offsets[:-1], examples.offsets[1:]
    kept = {
        "truncate": [np.arange(a, min(b, a + capacity)) for a, b in zip(starts, stops, strict=True)],
        # a last piece of one token has no target, so it is left out
        "split": [np.arange(a, b if (b - a) % capacity != 1 else b - 1) for a, b in zip(starts, stops, strict=True)],
        "drop": [np.arange(a, b) for a, b in zip(starts, stops, strict=True) if b - a <= capacity],
    }[overlong]
    assert np.array_equal(np.sort(tokens[segments > 0]), np.sort(np.concatenate(kept)) + 1)
    assert np.all(tokens[segments == 0] == 0) and not batch["loss_mask"][segments == 0].any()
    owner = np.searchsorted(examples.offsets, tokens - 1, side="right") - 1
    for row in range(len(plan)):
        count = segments[row].max()
        assert np.all(np.diff(segments[row][segments[row] > 0]) >= 0)  # 1, 2, 3 and then the padding
        for segment in range(1, count + 1):
            (at,) = np.nonzero(segments[row] == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert np.array_equal(positions[row, at], np.arange(len(at)))
            assert np.array_equal(np.diff(tokens[row, at]), np.ones(len(at) - 1))
            assert len(set(owner[row, at])) == 1
            assert not batch["loss_mask"][row, at[0]] and batch["loss_mask"][row, at[1:]].all()


@pytest.mark.parametrize("high", [16, 100, 2000])
def test_as_tight_as_trl(high):
    """TRL packs the same lengths into the same number of rows: it is the same rule."""
    import datasets
    from trl.data_utils import pack_dataset

    lengths = some_lengths(1000, high).clip(2, high)
    plan, _ = batch_of(make_examples(lengths), high, "best_fit")
    rows = [list(range(length)) for length in lengths]
    theirs = pack_dataset(datasets.Dataset.from_dict({"input_ids": rows}), high, "bfd", map_kwargs={"batch_size": 1000})
    assert len(plan) == len(theirs)
    mine = sorted(sorted(lengths_of_row) for lengths_of_row in rows_of(plan))
    assert sum(map(sum, mine)) == lengths.sum() and max(map(sum, mine)) <= high


def rows_of(plan):
    lengths = np.sort(plan.pieces.stop - plan.pieces.start)[::-1]
    return [lengths[plan.slots[a:b]].tolist() for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]


def test_by_hand():
    """10: 6+4, 5+5, 5+3+2. Best fit puts 4 beside 6, 3 with the last 5, 2 with them."""
    plan = pack.plan(pack.pieces(make_examples([5, 3, 5, 4, 6, 2, 5]), 10, "truncate"), 10, "best_fit")
    assert rows_of(plan) == [[6, 4], [5, 5], [5, 3, 2]]


def test_epochs_differ_and_repeat():
    examples = make_examples(some_lengths(200, 32))
    (_, first), (_, again) = (batch_of(examples, 32, "best_fit", epoch=0) for _ in range(2))
    _, second = batch_of(examples, 32, "best_fit", epoch=1)
    _, other = batch_of(examples, 32, "best_fit", epoch=0, seed=4)
    assert np.array_equal(first["tokens"], again["tokens"])
    assert first["tokens"].shape == second["tokens"].shape
    assert not np.array_equal(first["tokens"], second["tokens"]) and not np.array_equal(
        first["tokens"], other["tokens"]
    )
    assert np.array_equal(np.sort(first["tokens"], None), np.sort(second["tokens"], None))


def test_the_order_is_pinned():
    """A change of this order would change every run: it is part of the format of a cursor."""
    order = pack.shuffled(np.random.Philox(key=np.array([0, 0], np.uint64)), 8)
    assert order.tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_wrapped_is_one_stream():
    lengths = some_lengths(100, 20)
    examples = make_examples(lengths)
    plan, batch = batch_of(examples, 16, "wrapped", shuffle=False)
    total = int(lengths.sum())
    assert len(plan) == -(-total // 16) and "segments" not in batch
    stream = np.zeros(len(plan) * 16, np.int32)
    stream[:total] = examples.tokens
    assert np.array_equal(batch["tokens"].ravel(), stream)
    assert np.array_equal(batch["positions"][0], np.arange(16))
    assert not batch["loss_mask"][:, 0].any() and batch["loss_mask"][:-1, 1:].all()
    _, mixed = batch_of(examples, 16, "wrapped", epoch=2)
    assert not np.array_equal(mixed["tokens"], batch["tokens"])
    assert np.array_equal(np.sort(mixed["tokens"], None), np.sort(batch["tokens"], None))
    starts = np.isin(mixed["tokens"].ravel(), examples.offsets[:-1] + 1)
    follows = np.diff(mixed["tokens"].ravel()) == 1
    assert (follows[: total - 1] | starts[1:total]).all()  # each document runs on until the next begins


def test_one_a_row():
    examples = make_examples([3, 9, 5])
    plan, batch = batch_of(examples, 8, "none", shuffle=False)
    assert batch["tokens"].tolist() == [
        [1, 2, 3, 0, 0, 0, 0, 0],
        [4, 5, 6, 7, 8, 9, 10, 11],
        [13, 14, 15, 16, 17, 0, 0, 0],
    ]
    assert "segments" not in batch and plan.pieces.truncated == 1 and plan.pieces.cut_tokens == 1
    assert batch["loss_mask"].sum() == 2 + 7 + 4


def test_what_teaches_nothing_is_left_out_and_counted():
    learnt = np.array([0, 0, 1, 1] + [0] * 6 + [1] + [1, 0, 0] + [0, 1], bool)  # 4, 7, 3 and 2 tokens
    examples = make_examples([4, 7, 3, 2], learnt)
    found = pack.pieces(examples, 5, "truncate")
    assert found.start.tolist() == [0, 14] and found.stop.tolist() == [4, 16]
    assert (found.truncated, found.cut_tokens, found.dropped_unlearnt, found.dropped_tokens) == (1, 2, 2, 8)
    found = pack.pieces(examples, 5, "split")
    assert found.start.tolist() == [0, 9, 14] and (found.split, found.dropped_unlearnt) == (1, 2)


def test_tens_of_thousands_take_a_moment():
    examples = make_examples(some_lengths(50_000, 2048))
    start = time.process_time()
    plan = pack.plan(pack.pieces(examples, 2048, "truncate"), 2048, "best_fit")
    pack.epoch(plan, 0, 1, True)
    assert time.process_time() - start < 3
    used = (plan.pieces.stop - plan.pieces.start).sum()
    assert used / (len(plan) * 2048) > 0.995


def test_what_is_learnt_is_counted_block_by_block(monkeypatch):
    rng = np.random.default_rng(0)
    flags = rng.random(50) < 0.5
    start = np.sort(rng.integers(0, 51, 12))
    stop = np.minimum(start + rng.integers(0, 20, 12), 50)
    for block in (1, 3, 25, 50, 64):
        monkeypatch.setattr(pack, "BLOCK", block)
        expected = [flags[a:b].sum() for a, b in zip(start, stop, strict=True)]
        np.testing.assert_array_equal(pack.counted(flags, start, stop), expected)
    assert pack.counted(flags[:0], start[:0], stop[:0]).shape == (0,)
