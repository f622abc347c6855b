"""Batches: the same ones whatever the workers, exact after a restore, nothing lost at the end of an epoch."""

import dataclasses
import io
import json

import numpy as np
import pytest

from jaxft import data
from jaxft.data.errors import DataError

CONFIG = data.DataConfig(template="chatml", max_length=64)


def loader_of(path, tokenizer, batch_rows=4, epochs=2, **options):
    config = dataclasses.replace(CONFIG, path=path, **options)
    return data.Loader(data.prepare(config, tokenizer).train, config, batch_rows=batch_rows, epochs=epochs)


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_batches_do_not_depend_on_workers(make_tokenizer, write, chats, monkeypatch):
    """Bitwise, and after a restore with another number of workers: it is the same loader."""
    from jaxft.data import examples

    monkeypatch.setattr(examples, "CHUNK", 8)
    path, tokenizer = write(chats(60)), make_tokenizer()
    expected = list(loader_of(path, tokenizer))
    state = None
    for workers in (1, 2, 3):
        loader = loader_of(path, tokenizer, workers=workers)
        if state is not None:
            loader.restore(state)
        done = 0 if state is None else state["consumed"]
        for batch in expected[done : done + 3]:
            assert same(next(loader), batch)
        state = json.loads(json.dumps(loader.state()))
    assert state["consumed"] == 9


@pytest.mark.parametrize("packing", ["best_fit", "wrapped", "none"])
def test_restore_at_every_batch(make_tokenizer, write, chats, packing):
    path, tokenizer = write(chats(30)), make_tokenizer()
    loader = loader_of(path, tokenizer, packing=packing)
    batches, states = [], [loader.state()]
    for batch in loader:
        batches.append(batch)
        states.append(loader.state())
    assert len(batches) == loader.total_batches == 2 * loader.batches_per_epoch and loader.epoch == 2
    for done, state in enumerate(states):
        other = loader_of(path, tokenizer, packing=packing)
        next(other)  # batches already made ahead are thrown away
        other.restore(state)
        rest = list(other)
        assert len(rest) == len(batches) - done
        assert all(same(a, b) for a, b in zip(rest, batches[done:], strict=True))


def test_batches(make_tokenizer, write, chats):
    loader = loader_of(write(chats(30)), make_tokenizer(), length_multiple=48, max_length=64)
    for batch in loader:
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            "tokens": ((4, 96), "int32"),
            "positions": ((4, 96), "int32"),
            "segments": ((4, 96), "int32"),
            "loss_mask": ((4, 96), "bool"),
        }
        assert batch["positions"].max() < 64


def test_packed_is_unpacked(make_tokenizer, write, chats):
    """Each segment of a packed row is exactly a row of its own: tokens, positions and what is learnt."""
    path, tokenizer = write(chats(40)), make_tokenizer()

    def documents(packing):
        for batch in loader_of(path, tokenizer, packing=packing, epochs=1, max_length=100):
            for row in range(len(batch["tokens"])):
                segments = batch["segments"][row] if packing == "best_fit" else np.ones(100, np.int32)
                for segment in range(1, segments.max(initial=0) + 1):
                    (at,) = np.nonzero(segments == segment)
                    size = batch["positions"][row, at].max() + 1  # unpacked, the padding is position 0 again
                    if size > 1:
                        yield tuple(
                            tuple(batch[name][row, at[:size]].tolist()) for name in ("tokens", "positions", "loss_mask")
                        )

    packed = sorted(documents("best_fit"))
    assert packed == sorted(documents("none")) and len(packed) == 40


def test_nothing_is_lost_at_the_end_of_an_epoch(make_tokenizer, write, chats):
    path, tokenizer = write(chats(21)), make_tokenizer()
    for packing in ("best_fit", "none", "wrapped"):
        loader = loader_of(path, tokenizer, packing=packing, epochs=1, batch_rows=4, max_length=256)
        learnt = sum(int(batch["loss_mask"].sum()) for batch in loader)
        assert learnt == loader.report().learnt_tokens
        last = loader.batch(loader.batches_per_epoch - 1)
        empty = len(loader.plan) % 4 and 4 - len(loader.plan) % 4
        assert (last["loss_mask"].sum(1) == 0).sum() == empty


def test_endless_and_in_order(make_tokenizer, write, chats):
    path, tokenizer = write(chats(10)), make_tokenizer()
    loader = loader_of(path, tokenizer, epochs=None, shuffle=False, packing="none", batch_rows=5)
    batches = [next(loader) for _ in range(5)]
    assert loader.total_batches is None and loader.batches_per_epoch == 2
    assert same(batches[0], batches[2]) and same(batches[0], batches[4])
    examples = loader.examples
    firsts = [examples.tokens[examples.offsets[i] : examples.offsets[i] + 8] for i in range(5)]
    assert np.array_equal(batches[0]["tokens"][:, :8], firsts)
    loader.seek(0)
    assert same(next(loader), batches[0])


def test_another_cursor_is_refused(make_tokenizer, write, chats):
    path, tokenizer = write(chats(10)), make_tokenizer()
    state = loader_of(path, tokenizer).state()
    for options, name in (
        ({"seed": 1}, "seed"),
        ({"max_length": 63}, "max_length"),
        ({"batch_rows": 2}, "batch_rows"),
        ({"packing": "none"}, "packing"),
        ({"loss_on": "all"}, "examples"),
    ):
        with pytest.raises(DataError, match=f"data cursor: {name}"):
            loader_of(path, tokenizer, **options).restore(state)
    with pytest.raises(DataError, match="data cursor: examples"):
        loader_of(write(chats(11), "b.jsonl"), tokenizer).restore(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_refuse_or_are_counted(make_tokenizer, write, chats, workers):
    good = chats(6)
    bad = ['{"messages": ', {"messages": [{"role": "assistant", "content": "x"}]}, {"text": "x"}]
    path, tokenizer = write([*good[:3], *bad, *good[3:]]), make_tokenizer()
    with pytest.raises(DataError) as caught:
        loader_of(path, tokenizer, workers=workers)
    assert str(caught.value).startswith(f"{path}:4: got malformed JSON") and f"{path}:5, {path}:6" in str(caught.value)
    if workers:
        return
    loader = loader_of(path, tokenizer, on_error="skip")
    clean = loader_of(write(good, "good.jsonl"), tokenizer)
    assert all(same(a, b) for a, b in zip(loader, clean, strict=True))
    report = loader.report()
    assert report.reading.skipped == 3 and len(report.reading.errors) == 3
    assert "! 3 bad rows skipped" in report.lines() and any(f"{path}:5" in line for line in report.lines())
    with pytest.raises(DataError, match="no example to train on"):
        loader_of(write([bad[1]], "bad.jsonl"), tokenizer, on_error="skip")


def test_held_out_rows_depend_on_content_alone(make_tokenizer, write, chats):
    rows = chats(40)
    tokenizer = make_tokenizer()

    def held(path, **options):
        config = dataclasses.replace(CONFIG, path=path, **options)
        prepared = data.prepare(config, tokenizer)
        assert len(prepared.train) + len(prepared.held_out) == len(prepared.train.source)
        both = [{json.dumps(row.fields) for row in part.source_rows()} for part in (prepared.train, prepared.held_out)]
        assert not both[0] & both[1]
        return both[1]

    path = write(rows)
    fifth = held(path, eval_fraction=0.2)
    assert len(fifth) == 8 and held(path, eval_examples=8) == fifth
    assert held(path, eval_fraction=0.2, seed=9, shuffle=False) == fifth
    assert held(write(rows[::-1], "b.jsonl"), eval_fraction=0.2) == fifth
    assert held(write(rows * 2, "c.jsonl"), eval_fraction=0.2) == fifth  # copies stay together


def test_held_out_data_of_its_own(make_tokenizer, write, chats):
    train, other = write(chats(10)), write(chats(4, seed=1), "eval.jsonl")
    config = dataclasses.replace(CONFIG, path=train, eval_path=other)
    prepared = data.prepare(config, make_tokenizer())
    assert len(prepared.train) == 10 and len(prepared.held_out) == 4
    with pytest.raises(DataError, match=r"nowhere\.jsonl: `data\.eval_path`: got nothing there"):
        data.prepare(dataclasses.replace(config, eval_path="nowhere.jsonl"), make_tokenizer())
    with pytest.raises(DataError, match="several ways"):
        data.prepare(dataclasses.replace(config, eval_fraction=0.1), make_tokenizer())


def test_the_report_says_what_is_lost(make_tokenizer, write, chats):
    path, tokenizer = write(chats(20)), make_tokenizer()
    report = loader_of(path, tokenizer, max_length=48, on_error="skip").report()
    lengths = np.diff(data.prepare(dataclasses.replace(CONFIG, path=path), tokenizer).train.offsets)
    assert report.truncated == (lengths > 48).sum() and report.cut_tokens == (lengths - 48).clip(0).sum()
    assert report.packed_tokens == lengths.sum() - report.cut_tokens - report.dropped_tokens
    assert report.length_percentiles[100] == lengths.max()
    said = "\n".join(report.lines())
    assert f"! {report.truncated} examples truncated, losing {report.cut_tokens:,} tokens" in said
    split = loader_of(path, tokenizer, max_length=48, overlong="split").report()
    assert split.split == report.truncated and "examples split" in "\n".join(split.lines())
    dropped = loader_of(path, tokenizer, max_length=48, overlong="drop").report()
    assert dropped.dropped_overlong == report.truncated
    with pytest.raises(DataError, match="no example with anything to learn"):
        loader_of(path, tokenizer, max_length=2, on_error="skip")


def test_a_prompt_that_fills_the_window_is_refused_or_named(make_tokenizer, write, chats):
    """A row whose learnt part is cut away; one of several turns, of which a part is left, is only cut."""
    long = {"messages": [{"role": "user", "content": "the " * 80}, {"role": "assistant", "content": "b"}]}
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *long["messages"]]}
    good, tokenizer = chats(2), make_tokenizer()
    path = write([good[0], long, turns, good[1], long | {"id": 1}])
    with pytest.raises(DataError) as caught:
        loader_of(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:2: `prompt`: got a prompt that leaves nothing to learn in a window")
    assert f"more such rows: {path}:5" in str(caught.value)
    report = loader_of(path, tokenizer, on_error="skip").report()
    assert report.dropped_unlearnt == 2 and report.filled == (f"{path}:2", f"{path}:5")
    assert any(f"leaves nothing to learn of {path}:2, {path}:5" in line for line in report.lines())
    assert loader_of(path, tokenizer, overlong="split").report().filled == ()


def test_prompts(make_tokenizer, write, chats):
    tokenizer = make_tokenizer()
    config = dataclasses.replace(CONFIG, path=write(chats(10)), eval_examples=3)
    prepared = data.prepare(config, tokenizer)
    found = data.prompts(prepared.held_out.source_rows(), prepared.format, config, tokenizer)
    rows = prepared.held_out.source_rows()
    assert [prompt.answer for prompt in found] == [row.fields["messages"][-1]["content"] for row in rows]
    assert all(prompt.text.endswith("<|im_start|>assistant\n") for prompt in found)
    assert [tokenizer.decode(prompt.tokens) for prompt in found] == [prompt.text for prompt in found]
    config = dataclasses.replace(CONFIG, path=write([{"prompt": "what", "completion": " a"}], "p.jsonl"))
    prepared = data.prepare(config, tokenizer)
    (prompt,) = data.prompts(prepared.train.source_rows(), prepared.format, config, tokenizer)
    assert (prompt.text, prompt.answer, list(prompt.tokens)) == ("what", " a", tokenizer("what")["input_ids"])


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_preview_shows_what_is_learnt(make_tokenizer, write, packing):
    from rich.console import Console

    messages = [{"role": "user", "content": "what is it é"}, {"role": "assistant", "content": "a cat 😀"}]
    path = write([{"messages": messages}] * 2)
    config = dataclasses.replace(CONFIG, path=path, packing=packing, eval_examples=0)
    console = Console(color_system=None, width=200, record=True, file=io.StringIO())
    data.preview(config, make_tokenizer(), console, rows=1)
    shown = console.export_text()
    assert shown.count("<|im_start|>user\nwhat is it é<|im_end|>\n<|im_start|>assistant\n⟦a cat 😀<|im_end|>⟧\n") == (
        2 if packing == "best_fit" else 1
    )
    assert "training data (messages)" in shown and "learnt (" in shown
    console = Console(color_system="truecolor", force_terminal=True, width=200, record=True, file=io.StringIO())
    data.preview(config, make_tokenizer(), console, rows=1)
    assert "⟦" not in console.export_text(clear=False, styles=True) and "\x1b[" in console.export_text(styles=True)
