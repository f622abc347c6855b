"""A teacher's likeliest tokens, stored and read again: the right ones in the right places, and of nothing else."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data import topk as disk
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.examples import Examples, Reading
from jaxft.data.loader import Loader
from jaxft.models import decoder, families, heads, init
from jaxft.rollout import topk

V, K, WINDOW, TAU = 53, 4, 12, 1.5
RAW = {"model_type": "llama", "vocab_size": V, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
       "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}  # fmt: skip
LENGTHS = (5, 1, 17, 3, 12, 9, 24, 2)


@functools.cache
def teacher():
    config, names = families.read(RAW)
    params = init.random(config, names, jax.random.key(0), jnp.float32, 0.3)
    return (
        config,
        params,
        jax.jit(functools.partial(topk.make_top(config, K, dtype=jnp.float32, temperature=TAU), params)),
    )


def examples(lengths=LENGTHS, seed=0):
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = np.random.default_rng(seed).integers(0, V, offsets[-1]).astype(np.int32)
    numbers = np.arange(len(lengths))
    return Examples(tokens, tokens > 5, offsets, numbers, numbers * 0, 0, None, Reading())


def about(held, **changes):
    made = disk.about(held, "a teacher", K, TAU, V, WINDOW)
    return dataclasses.replace(made, **changes)


def counted(calls):
    def top(batch):
        calls.append(batch["tokens"].shape)
        return teacher()[2](batch)

    return top


@pytest.fixture
def small(monkeypatch):
    """Files of a few examples."""
    monkeypatch.setattr(disk, "TOKENS", 20)
    monkeypatch.setattr(topk, "LEAST_WIDTH", 8)


def test_what_is_read_is_what_the_teacher_says(tmp_path, small):
    """Each document alone, in windows of 12, over all logits; float16 keeps three digits. Zeros for a first token."""
    config, params, _ = teacher()
    held, calls, told = examples(), [], []
    topk.store(
        tmp_path / "a", held, about(held), counted(calls), batch_tokens=24, rows=2, told=lambda *n: told.append(n)
    )
    stored = disk.read(tmp_path / "a", about(held))
    assert stored.starts == (0, 23, 47, 71, 73) and told == [(i, 4) for i in range(5)]
    assert set(calls) == {(2, 8), (2, 12)}  # two programs
    ids, logp = stored.rows(0, 73)
    assert (ids.dtype, logp.dtype, ids.shape) == (np.int32, np.float16, (73, K))
    plain = jax.jit(lambda tokens: heads.logits(config, params["head"], decoder.forward(config, params, tokens)[0]))
    windows = [
        (start, min(start + WINDOW, stop))
        for first, stop in itertools.pairwise(held.offsets.tolist())
        for start in range(first, stop, WINDOW)
    ]
    padded = np.stack([np.pad(held.tokens[a:b], (0, WINDOW - b + a)) for a, b in windows])
    p = np.asarray(jax.nn.log_softmax(plain(padded) / TAU))
    for (a, b), own in zip(windows, p, strict=True):
        assert not ids[a].any() and not logp[a].any()
        own = own[: b - a - 1]
        best = np.argsort(-own, -1)[:, :K]
        np.testing.assert_array_equal(ids[a + 1 : b], best)
        np.testing.assert_allclose(logp[a + 1 : b], np.take_along_axis(own, best, -1), rtol=2**-11, atol=1e-5)
    for start, stop in ((0, 5), (20, 50), (46, 47), (47, 48), (72, 73)):  # within a file, across files, at an edge
        np.testing.assert_array_equal(stored.rows(start, stop)[0], ids[start:stop])
        np.testing.assert_array_equal(stored.rows(start, stop)[1], logp[start:stop])


def test_what_was_begun_goes_on(tmp_path, small, monkeypatch):
    """After two files of four, and one that was being written; what is there is not made again, and cut as it was."""
    held, folder = examples(), tmp_path / "b"

    class Ended(Exception):
        pass

    def end(done, files):
        if done == 2:
            raise Ended

    with pytest.raises(Ended):
        topk.store(folder, held, about(held), teacher()[2], told=end)
    (folder / "00002.partial").write_bytes(b"half")
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    with pytest.raises(DataError, match=r"got 2 of 4 files .*00002.npy"):
        disk.read(folder, about(held))
    with monkeypatch.context() as patch:
        patch.setattr(disk, "TOKENS", 40)
        topk.store(folder, held, about(held), teacher()[2])
    topk.store(tmp_path / "whole", held, about(held), teacher()[2])
    again, whole = (disk.read(path, about(held)).rows(0, 73) for path in (folder, tmp_path / "whole"))
    np.testing.assert_array_equal(again, whole)
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times and len(times) == 2
    assert sorted(path.name for path in folder.iterdir()) == [*(f"0000{i}.npy" for i in range(4)), "topk.json"]


OTHER = {
    "teacher": ({"teacher": "b"}, "`teacher`: got 'a teacher'; expected 'b'.*changed weights"),
    "count": ({"count": 5}, "`count`: got 4; expected 5"),
    "temperature": ({"temperature": 1.0}, "`temperature`: got 1.5; expected 1.0"),
    "vocabulary": ({"vocabulary": 50}, "`vocabulary`: got 53"),
    "window": ({"window": 24}, "`window`: got 12.*max_length"),
}


def test_anything_else_is_refused_by_name(tmp_path):
    held, folder = examples((5, 14)), tmp_path / "c"
    topk.store(folder, held, about(held), teacher()[2])
    for changes, told in OTHER.values():
        for use in (disk.read, lambda folder, of: disk.begin(folder, of, [0, 19])):
            with pytest.raises(DataError, match=told):
                use(folder, about(held, **changes))
    assert disk.read(folder, about(held, teacher="")).about.teacher == "a teacher"
    with pytest.raises(DataError, match=r"`examples`.*other data"):
        disk.read(folder, about(examples((5, 14), seed=1)))
    short = examples((5, 7))
    assert disk.about(short, "", K, TAU, V, 100) == disk.about(short, "", K, TAU, V, 7)  # nothing is cut by either


def test_damage_is_named(tmp_path):
    held, folder = examples((5, 7)), tmp_path / "d"
    with pytest.raises(DataError, match=r"no topk.json"):
        disk.read(folder, about(held))
    topk.store(folder, held, about(held), teacher()[2])
    np.save(folder / "00000.npy", np.zeros((3, K), disk.RECORD))
    with pytest.raises(DataError, match=r"00000.npy: got .*\[3, 4\]; expected .*\[12, 4\]"):
        disk.read(folder, about(held)).rows(0, 5)
    (folder / "00000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"00000.npy: got what cannot be read"):
        disk.read(folder, about(held)).rows(0, 5)
    said = json.loads((folder / "topk.json").read_text())
    (folder / "topk.json").write_text(json.dumps({**said, "codec": "new"}))
    with pytest.raises(DataError, match="codec"):
        disk.read(folder, about(held))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="something else"):
        topk.store(tmp_path / "e", held, about(held), teacher()[2])


@pytest.mark.parametrize(("overlong", "reserved"), [("split", 0), ("truncate", 3)])
def test_batches_have_it_beside_their_tokens(tmp_path, small, overlong, reserved):
    """Wherever packing puts a document: what the teacher says of the whole batch, at every target."""
    held, folder = examples(), tmp_path / "f"
    topk.store(folder, held, about(held), teacher()[2])
    config = DataConfig("x", max_length=WINDOW + reserved, packing="best_fit", overlong=overlong, length_multiple=1)
    made = Loader(held, config, batch_rows=3, epochs=1, reserved=reserved, beside=disk.read(folder, about(held)))
    targets = 0
    for number in range(made.total_batches):
        batch = made.batch(number)
        documents = {
            "tokens": batch["tokens"],
            "segments": np.where(batch["positions"] < reserved, 0, batch["segments"]),
        }
        live = {name: np.asarray(a) for name, a in teacher()[2](documents).items()}
        here = batch["loss_mask"] & (batch["positions"] > reserved)
        np.testing.assert_array_equal(batch["teacher_ids"][here], live["ids"][here])
        np.testing.assert_allclose(batch["teacher_logp"][here], live["logp"][here], rtol=2**-10, atol=1e-4)
        targets += here.sum()
    assert targets > 30 and batch["teacher_logp"].dtype == np.float16
    with pytest.raises(DataError, match="`window`: got 12; expected 16"):
        longer = dataclasses.replace(config, max_length=16 + reserved)
        Loader(held, longer, batch_rows=3, reserved=reserved, beside=disk.read(folder, about(held)))
    with pytest.raises(DataError, match=r"data.packing.*wrapped"):
        wrapped = dataclasses.replace(config, packing="wrapped")
        Loader(held, wrapped, batch_rows=3, reserved=reserved, beside=disk.read(folder, about(held)))
