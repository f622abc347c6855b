"""Room for a prompt before every document, and the task of each."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from jaxft import data
from jaxft.data.errors import DataError
from jaxft.data.preview import without_prompts

CONFIG = data.DataConfig(template="chatml", max_length=64)
N = 5


def loader_of(path, tokenizer, reserved=N, **options):
    config = dataclasses.replace(CONFIG, path=path, **options)
    examples = data.prepare(config, tokenizer).train
    return data.Loader(examples, config, batch_rows=4, epochs=1, reserved=reserved)


def documents(loader, reserved):
    """(tokens, what is learnt) of every packed document, without the positions that are reserved."""
    found = []
    for batch in loader:
        for row in range(4):
            for number in range(1, batch["segments"][row].max() + 1):
                mine = batch["segments"][row] == number
                assert batch["positions"][row][mine].tolist() == list(range(mine.sum()))
                assert not batch["loss_mask"][row][mine][: reserved + 1].any()
                found.append((batch["tokens"][row][mine][reserved:], batch["loss_mask"][row][mine][reserved:]))
    return sorted((t.tolist(), m.tolist()) for t, m in found)


def test_every_packed_document_has_room_before_it(make_tokenizer, write, chats):
    """The documents are those of rows that are shorter by the room; the report counts it."""
    path, tokenizer = write(chats(40)), make_tokenizer()
    loader = loader_of(path, tokenizer)
    got = documents(loader, N)
    assert got == documents(loader_of(path, tokenizer, reserved=0, max_length=64 - N), 0)
    report = loader.report()
    assert report.reserved_positions == N * len(got) and 0.8 < report.efficiency <= 1
    assert f"{N * len(got):,} of them for the prompt" in "\n".join(report.lines())


@pytest.mark.parametrize("packing", ["none", "wrapped"])
def test_other_rows_are_shorter_by_the_room(make_tokenizer, write, chats, packing):
    """The model puts the prompt before the row: both together are as long as asked for."""
    path, tokenizer = write(chats(20)), make_tokenizer()
    loader = loader_of(path, tokenizer, packing=packing, length_multiple=16)
    plain = loader_of(path, tokenizer, reserved=0, packing=packing, max_length=64 - N)
    for batch, other in zip(loader, plain, strict=True):
        assert batch["tokens"].shape == (4, 64 - N) and "segments" not in batch
        assert all(np.array_equal(batch[name], other[name]) for name in other)


def test_a_cursor_belongs_to_its_room(make_tokenizer, write, chats):
    path, tokenizer = write(chats(10)), make_tokenizer()
    with pytest.raises(DataError, match="reserved`: got 5 in the checkpoint and 4 now"):
        loader_of(path, tokenizer, reserved=4).restore(loader_of(path, tokenizer).state())
    with pytest.raises(DataError, match="more than the 63 that the prompt takes"):
        loader_of(path, tokenizer, reserved=63)


def test_each_document_has_the_task_of_its_row(make_tokenizer, write, chats):
    """In the batch, with the room before it; in the prompts for generation; not at all where all are of task 0."""
    rows, tokenizer = chats(12), make_tokenizer()
    numbered = write([{**row, "kind": i % 3} for i, row in enumerate(rows)])
    config = dataclasses.replace(CONFIG, path=numbered, task_column="kind", max_length=256)
    prepared = data.prepare(config, tokenizer)
    loader = data.Loader(prepared.train, config, batch_rows=4, epochs=1, reserved=N)
    names = {tuple(prepared.train.tokens[a:b].tolist()): i % 3 for i, (a, b) in enumerate(bounds(prepared.train))}
    for batch in loader:
        assert batch["task_ids"].dtype == np.int32 and not batch["task_ids"][batch["segments"] == 0].any()
        for row in range(4):
            for number in range(1, batch["segments"][row].max() + 1):
                mine = batch["segments"][row] == number
                (task,) = set(batch["task_ids"][row][mine].tolist())
                assert names[tuple(batch["tokens"][row][mine][N:].tolist())] == task
    prompts = data.prompts(prepared.train.source_rows(), prepared.format, config, tokenizer)
    assert [prompt.task for prompt in prompts] == [i % 3 for i in range(12)]
    assert "task_ids" not in loader_of(numbered, tokenizer).batch(0)


def bounds(examples):
    return zip(examples.offsets[:-1], examples.offsets[1:], strict=True)


@pytest.mark.parametrize("wrong", ["2", -1, None, True])
def test_a_task_is_a_number(make_tokenizer, write, chats, wrong):
    path = write([{**row, "kind": wrong} for row in chats(3)])
    with pytest.raises(DataError, match=r"rows.jsonl.*kind.*whole number"):
        loader_of(path, make_tokenizer(), task_column="kind")


def test_tasks_do_not_share_a_wrapped_row(make_tokenizer, write, chats):
    path = write([{**row, "kind": i} for i, row in enumerate(chats(3))])
    with pytest.raises(DataError, match=r"data\.packing"):
        loader_of(path, make_tokenizer(), task_column="kind", packing="wrapped")


def test_the_preview_leaves_the_room_out(make_tokenizer, write, chats):
    path, tokenizer = write(chats(10)), make_tokenizer()
    batch = loader_of(path, tokenizer).batch(0)
    row = {name: array[0] for name, array in batch.items()}
    held = without_prompts(row, N)
    own = [held["tokens"][held["segments"] == i] for i in range(1, row["segments"].max() + 1)]
    whole = [row["tokens"][row["segments"] == i] for i in range(1, row["segments"].max() + 1)]
    assert [a.tolist() for a in own] == [a[N:].tolist() for a in whole] and len(own) > 0
    text = io.StringIO()
    data.preview(dataclasses.replace(CONFIG, path=path), tokenizer, Console(file=text, width=200), reserved=N)
    assert "of them for the prompt" in text.getvalue()
