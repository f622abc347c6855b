"""Tokens on disk: the same batches as from memory, also when writing was cut short, with no memory for the tokens."""

import dataclasses
import json
import os
import random
import tracemalloc

import numpy as np
import pytest

from jaxft import data
from jaxft.data import examples, pack, records, store
from jaxft.data.config import SourceConfig
from jaxft.data.errors import DataError
from tests.data.conftest import WORDS
from tests.data.test_loader import CONFIG, same


@pytest.fixture
def small(monkeypatch):
    """Chunks of 8 rows, progress written after every one."""
    monkeypatch.setattr(examples, "CHUNK", 8)
    monkeypatch.setattr(store, "FLUSH", 1)


def documents(count, words=12, seed=0):
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * words)))} for _ in range(count)]


def loaders(config, tokenizer):
    """Training and held-out batches, two epochs and one."""
    prepared = data.prepare(config, tokenizer)
    parts = [(prepared.train, 2)] + ([] if prepared.held_out is None else [(prepared.held_out, 1)])
    return [data.Loader(part, config, batch_rows=4, epochs=epochs) for part, epochs in parts]


def alike(config, cached, tokenizer):
    """Whether all batches, the report and the cursor are the same."""
    pairs = list(zip(loaders(config, tokenizer), loaders(cached, tokenizer), strict=True))
    for one, two in pairs:
        assert [*one.report().lines()] == [*two.report().lines()]
        other = list(two)
        assert all(same(a, b) for a, b in zip(one, other, strict=True)) and two.state() == one.state()
        two.restore({**one.state(), "consumed": 1})  # the cursor of a run from memory
        assert same(next(two), other[1])
        assert isinstance(two.examples.tokens, np.memmap)
    return len(pairs)


@pytest.mark.parametrize("packing", ["best_fit", "wrapped"])
@pytest.mark.parametrize("form", ["text", "chat"])
def test_batches_are_those_from_memory(small, make_tokenizer, write, chats, tmp_path, form, packing):
    path, tokenizer = write(documents(60) if form == "text" else chats(60)), make_tokenizer()
    config = dataclasses.replace(CONFIG, path=path, packing=packing, max_length=24, eval_examples=7, overlong="split")
    assert alike(config, dataclasses.replace(config, cache=str(tmp_path / "cache")), tokenizer) == 2


def test_a_mixture_is_that_from_memory(small, make_tokenizer, write, chats, tmp_path):
    tokenizer = make_tokenizer()
    sources = {
        "text": SourceConfig(path=write(documents(60)), weight=3, eval_examples=5),
        "chat": SourceConfig(path=write(chats(20), "chats.jsonl"), weight=1, eval_examples=4),
    }
    config = dataclasses.replace(CONFIG, sources=sources)
    assert alike(config, dataclasses.replace(config, cache=str(tmp_path / "cache")), tokenizer) == 2


def test_what_was_cut_short_goes_on_where_it_was(small, make_tokenizer, write, tmp_path, monkeypatch):
    """At every chunk, with bytes beyond what is said to be there; then nothing is tokenised again."""
    path, tokenizer = write([*documents(40), "not json", *documents(20, seed=1)]), make_tokenizer()
    config = dataclasses.replace(CONFIG, path=path, on_error="skip")
    cached = dataclasses.replace(config, cache=str(tmp_path / "cache"))
    encode, done = examples.Work.__call__, []

    def once(work, start):
        if len(done) % 2 and done[-1] != start:
            done.append(start)
            raise KeyboardInterrupt
        done.append(start)
        return encode(work, start)

    monkeypatch.setattr(examples.Work, "__call__", once)
    interrupted = 0
    while True:
        try:
            data.prepare(cached, tokenizer)
            break
        except KeyboardInterrupt:
            interrupted += 1
            (folder,) = (tmp_path / "cache").iterdir()
            for name in store.ARRAYS:
                with open(folder / f"{name}.bin", "ab") as file:
                    file.write(b"torn")
    assert interrupted >= 3 and sorted(set(done)) == list(range(0, 61, 8))
    monkeypatch.setattr(examples.Work, "__call__", encode)
    expected = list(loaders(config, tokenizer)[0])
    monkeypatch.setattr(examples, "Work", None)
    with pytest.raises(TypeError):
        data.prepare(config, tokenizer)
    (loader,) = loaders(cached, tokenizer)
    assert all(same(a, b) for a, b in zip(loader, expected, strict=True))
    assert loader.examples.reading.skipped == 1


def test_other_rows_and_other_settings_are_other_folders(small, make_tokenizer, write, chats, tmp_path):
    tokenizer, cache = make_tokenizer(), tmp_path / "cache"
    config = dataclasses.replace(CONFIG, path=write(chats(10)), cache=str(cache))
    for more, folders in (({}, 1), ({"seed": 1, "max_length": 32}, 1), ({"loss_on": "last"}, 2), ({"limit": 5}, 3)):
        data.prepare(dataclasses.replace(config, **more), tokenizer)
        assert len(list(cache.iterdir())) == folders, more
    os.utime(config.path, ns=(1, 1))
    data.prepare(config, tokenizer)
    data.prepare(config, make_tokenizer(kind="gpt2"))
    assert len(list(cache.iterdir())) == 5


def test_memory_does_not_grow_with_the_tokens(make_tokenizer, write, tmp_path, monkeypatch):
    """Bytes allocated at most for each token more, while tokenising, packing, and making batches: on disk only what is
    known of each example and row."""
    monkeypatch.setattr(examples, "CHUNK", 32)
    monkeypatch.setattr(records, "BLOCK", 2**12)
    monkeypatch.setattr(store, "TOGETHER", 2**12)
    monkeypatch.setattr(pack, "BLOCK", 2**12)
    tokenizer = make_tokenizer()
    paths = [write(documents(count, words=150), f"{count}.jsonl") for count in (200, 800)]

    def peak(path, cache):
        config = dataclasses.replace(
            CONFIG, path=path, max_length=1024, packing="wrapped", cache=cache, eval_examples=9
        )
        tracemalloc.start()
        loader = data.Loader(data.prepare(config, tokenizer).train, config, batch_rows=4, epochs=1)
        loader.report(), loader.state()
        assert sum(1 for _ in loader) == loader.total_batches
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return np.array([most, loader.examples.offsets[-1]])

    for cache, low, high in ((None, 5, 20), (str(tmp_path / "cache"), -1, 2)):
        for _ in range(1 if cache is None else 2):  # as it is written, and as it is read
            more, tokens = peak(paths[1], cache) - peak(paths[0], cache)
            assert low <= more / tokens <= high, (cache, more / tokens)


def test_refusals(small, make_tokenizer, write, chats, tmp_path):
    tokenizer = make_tokenizer()
    config = dataclasses.replace(CONFIG, path=write(chats(10)), cache=str(tmp_path / "cache"))
    data.prepare(config, tokenizer)
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "loss.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"loss.bin: `data.cache`: got 0 bytes.*Delete the folder"):
        data.prepare(config, tokenizer)
    pairs = write([{"prompt": "a", "chosen": "b", "rejected": "c"}], "pairs.jsonl")
    with pytest.raises(DataError, match=r"data.cache.*an objective on pairs"):
        data.prepare(dataclasses.replace(config, path=pairs), tokenizer, "pairs")
    assert json.loads((folder / store.PROGRESS).read_text())["next_row"] == 10
