"""Batches of whole sequences: pairs, labelled completions, and what all rows that are judged have in common."""

import dataclasses
import hashlib
import io
import json
import random

import numpy as np
import pytest

from jaxft import data
from jaxft.data import pack
from jaxft.data.errors import DataError

WORDS = "the cat sat on a mat and saw two dogs run to town what is it called here yes no".split()
CONFIG = data.DataConfig(template="chatml", max_length=64)


def say(rng, low=1, high=10):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def some_pairs(number, seed=0, **more):
    """Chats with two last replies."""
    rng = random.Random(seed)
    rows = []
    for i in range(number):
        messages = []
        for _ in range(rng.randint(1, 2)):
            messages += [{"role": "user", "content": say(rng)}, {"role": "assistant", "content": say(rng)}]
        replies = [{"role": "assistant", "content": f"{mood} {say(rng)}"} for mood in ("yes", "no")]
        rows.append({"prompt": messages[:-1], "chosen": replies[:1], "rejected": replies[1:]} | more | {"id": i})
    return rows


def some_labelled(number, seed=0):
    rows = some_pairs(number, seed)
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0} for i, row in enumerate(rows)]


def prepared(path, tokenizer, rows, **options):
    return data.prepare(dataclasses.replace(CONFIG, path=path, **options), tokenizer, rows=rows)


def loader_of(path, tokenizer, rows, batch_rows=4, epochs=1, **options):
    config = dataclasses.replace(CONFIG, path=path, **options)
    return data.Loader(data.prepare(config, tokenizer, rows=rows).train, config, batch_rows=batch_rows, epochs=epochs)


def sequences(batch, prefix=""):
    """(row, place, tokens, mask, positions) of each, as the segments have them."""
    for row, segments in enumerate(batch[f"{prefix}segments"]):
        for place in range(int(segments.max())):
            (at,) = np.nonzero(segments == place + 1)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            values = (batch[f"{prefix}{name}"][row, at].tolist() for name in ("tokens", "loss_mask", "positions"))
            yield row, place, *values


def as_sft(row, reply, tokenizer, write):
    """What sft makes of the prompt with one reply, learning the last turn."""
    path = write([{"messages": [*row["prompt"], reply]}], "one.jsonl")
    made = data.prepare(dataclasses.replace(CONFIG, path=path, loss_on="last", max_length=512), tokenizer).train
    return made.tokens.tolist(), made.loss.tolist()


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_pairs_are_two_sft_examples_in_a_row(make_tokenizer, write, packing):
    rows, tokenizer = some_pairs(12), make_tokenizer()
    loader = loader_of(write(rows), tokenizer, "pairs", packing=packing, max_length=128)
    slots, found = loader.plan.sequences, []
    assert slots % 2 == 0 and (slots == 2) == (packing == "none")
    for batch in loader:
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            "tokens": ((4, 256), "int32"),
            "positions": ((4, 256), "int32"),
            "loss_mask": ((4, 256), "bool"),
            "segments": ((4, 256), "int32"),
            "sequence_mask": ((4, slots), "bool"),
        }
        assert np.array_equal(batch["sequence_mask"].sum(1), batch["segments"].max(1))
        each = list(sequences(batch))
        assert all(positions == list(range(len(positions))) for *_, positions in each)
        assert [place % 2 for _, place, *_ in each] == [0, 1] * (len(each) // 2)
        found += [(tuple(a[2:4]), tuple(b[2:4])) for a, b in zip(each[::2], each[1::2], strict=True)]
    expected = [tuple(as_sft(row, row[name][0], tokenizer, write) for name in ("chosen", "rejected")) for row in rows]
    assert sorted(found) == sorted(expected)
    for (one, one_learnt), (other, other_learnt) in found:
        given = one_learnt.index(True)
        assert one[:given] == other[:given] and other_learnt.index(True) == given
        assert tokenizer.decode(one[-2:]).endswith("<|im_end|>\n") and one_learnt[-2] and not one_learnt[-1]


def test_prompts_of_a_pair_are_the_same_tokens(make_tokenizer, write):
    """Whatever the boundary: joined by a merge, cut in pieces, or shared by a tokenizer that cannot cut."""
    rows = [
        {"prompt": "what is it\n", "chosen": "\nyes", "rejected": "no"},
        {"prompt": "the ca", "chosen": "t sat", "rejected": " on a mat"},
    ]
    for kind in ("bytes", "gpt2", "metaspace"):
        tokenizer = make_tokenizer(kind=kind)
        made = prepared(write(rows), tokenizer, "pairs").train
        for i in range(2):
            low, middle, high = made.offsets[2 * i : 2 * i + 3]
            given = [int(np.argmax(made.loss[a:b])) for a, b in ((low, middle), (middle, high))]
            assert given[0] == given[1] > 0
            assert np.array_equal(made.tokens[low : low + given[0]], made.tokens[middle : middle + given[0]])
            assert made.loss[low + given[0] : middle].all() and made.loss[middle + given[0] : high].all()
            assert tokenizer.decode(made.tokens[low : middle - 1]).endswith(rows[i]["chosen"])
            if kind != "metaspace":
                assert made.tokens[low : low + given[0]].tolist() == tokenizer(rows[i]["prompt"])["input_ids"]
        assert (made.reading.shared_boundaries > 0) == (kind == "metaspace")
        assert (made.reading.cut_boundaries > 0) == (kind != "metaspace")


def test_margins(make_tokenizer, write):
    rows = some_pairs(6)
    rows = [row | {"margin": i + 0.5} for i, row in enumerate(rows)]
    loader = loader_of(write(rows), make_tokenizer(), "pairs", shuffle=False, packing="none", batch_rows=6)
    batch = next(loader)
    assert batch["margin"].dtype == np.float32
    assert batch["margin"].tolist() == [[i + 0.5, 0.0] for i in range(6)]
    for changed in (rows[:3] + some_pairs(1), some_pairs(1) + rows[:3]):
        path = write(changed, "mixed.jsonl")
        with pytest.raises(DataError, match=r"mixed\.jsonl:[24]: `margin`: .*Give every row a margin, or none"):
            prepared(path, make_tokenizer(), "pairs")


def test_labelled_rows_and_pairs_taken_apart(make_tokenizer, write):
    rows, tokenizer = some_labelled(9), make_tokenizer()
    loader = loader_of(write(rows), tokenizer, "labelled", max_length=128)
    found = [
        (tokens, loss, bool(batch["label"][row, place]))
        for batch in loader
        for row, place, tokens, loss, _ in sequences(batch)
    ]
    expected = [(*as_sft(row, row["completion"][0], tokenizer, write), row["label"]) for row in rows]
    assert sorted(found) == sorted(expected)
    assert "9 completions (6 desirable, 3 undesirable) of 9 rows read" in loader.report().lines()
    pairs = some_pairs(5)
    made = prepared(write(pairs, "pairs.jsonl"), tokenizer, "labelled").train
    assert made.columns["label"].tolist() == [True, False] * 5 and made.rows.tolist() == np.repeat(range(5), 2).tolist()
    paired = prepared(write(pairs, "pairs.jsonl"), tokenizer, "pairs").train
    assert np.array_equal(made.tokens, paired.tokens) and np.array_equal(made.loss, paired.loss)


@pytest.mark.parametrize(("packing", "max_length"), [("best_fit", 64), ("best_fit", 40), ("none", 48)])
def test_mismatched_completions(make_tokenizer, write, packing, max_length):
    """Over the whole batch: prompt i with completion i - 1, cut to the window, like sequences of their own."""
    path, tokenizer = write(some_labelled(31)), make_tokenizer()
    loader = loader_of(path, tokenizer, "labelled", packing=packing, max_length=max_length, on_error="skip")
    width, slots, cut = loader.kl_length, loader.plan.sequences, 0
    for batch in loader:
        mine, kl = list(sequences(batch)), list(sequences(batch, "kl_"))
        assert batch["kl_tokens"].shape == (4, width) and batch["kl_sequence_mask"].shape == (4, slots)
        assert np.array_equal(batch["kl_sequence_mask"].sum(1), batch["kl_segments"].max(1))
        if len(mine) == 1:
            assert not kl and not batch["kl_sequence_mask"].any() and not batch["kl_loss_mask"].any()
            continue
        for i, (row, place, tokens, loss, _) in enumerate(mine):
            _, _, before, before_loss, _ = mine[i - 1]
            a, b = loss.index(True), before_loss.index(True)
            expected = (tokens[:a] + before[b:])[:max_length]
            assert kl[i][:4] == (row, place, expected, ([False] * a + before_loss[b:])[:max_length])
            cut += len(tokens[:a] + before[b:]) > max_length
            assert any(kl[i][3]) and kl[i][4] == list(range(len(expected)))
    assert cut or max_length == 64
    assert "kl_tokens" not in data.Loader(loader.examples, loader.config, batch_rows=4, mismatched=False).batch(0)


def test_a_single_sequence_has_no_mismatch(make_tokenizer, write):
    loader = loader_of(write(some_labelled(5)), make_tokenizer(), "labelled", packing="none")
    first, last = list(loader)
    assert first["kl_sequence_mask"].sum() == 4 and last["sequence_mask"].sum() == 1
    assert not last["kl_sequence_mask"].any() and not last["kl_segments"].any()
    assert {name: array.shape for name, array in first.items()} == {name: array.shape for name, array in last.items()}


def test_truncation_keeps_the_start_of_both(make_tokenizer, write):
    path, tokenizer = write(some_pairs(8)), make_tokenizer()
    whole = prepared(path, tokenizer, "pairs").train
    loader = loader_of(path, tokenizer, "pairs", max_length=30, on_error="skip")
    kept = {tuple(tokens) for batch in loader for *_, tokens, _, _ in sequences(batch)}
    starts = [
        tuple(whole.tokens[a : min(a + 30, b)].tolist()) for a, b in zip(whole.offsets, whole.offsets[1:], strict=False)
    ]
    assert kept <= set(starts) and loader.report().truncated > 0
    assert any("raise data.max_length" in line for line in loader.report().lines())
    dropped = loader_of(path, tokenizer, "pairs", max_length=30, overlong="drop")
    short = [
        max(b - a, c - b) <= 30
        for a, b, c in zip(whole.offsets[:-1:2], whole.offsets[1::2], whole.offsets[2::2], strict=True)
    ]
    assert 0 < len(dropped.plan.pieces) == sum(short) and dropped.report().dropped_overlong == 2 * (8 - sum(short))


@pytest.mark.parametrize(
    ("rows", "bad", "words"),
    [
        ("pairs", {"prompt": "the " * 80, "chosen": "b", "rejected": "c"}, "nothing of `chosen` in a window of 64"),
        ("pairs", {"prompt": "a", "chosen": "b " * 99 + "c", "rejected": "b " * 99}, "the same 64 tokens in both"),
        (
            "pairs",
            {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
             "rejected": [{"role": "assistant", "content": "b", "name": "c"}]},
            "tokens in both, whose difference the template or the tokenizer takes away; expected two different "
            "completions. Mend the row",
        ),
        ("labelled", {"prompt": "the " * 80, "completion": "b", "label": True}, "nothing of `completion` in a window"),
        ("labelled", {"prompt": "the " * 80, "chosen": "b", "rejected": "c"}, "nothing of `completion` in a window"),
        ("steps", {"prompt": "a", "completions": ["b " * 90], "labels": [True]}, "no step that ends in a window of 64"),
        ("steps", {"prompt": "the " * 90, "completions": ["b"], "labels": [True]}, "nothing of `completions`"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"}, "`chosen, rejected`: got the same in both"),
        (
            "pairs",
            {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
            "`prompt, chosen, rejected`: got list, str, str",
        ),
        (
            "pairs",
            {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
             "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
            "got messages; expected plain text, as the first rows have",
        ),
        ("labelled", {"prompt": "a", "completion": "b", "label": None}, "`label`: got nothing"),
    ],
)  # fmt: skip
def test_bad_rows_refuse_or_are_counted(make_tokenizer, write, rows, bad, words):
    good = {
        "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "labelled": {"prompt": "a", "completion": "b", "label": True},
        "steps": {"prompt": "a", "completions": ["b"], "labels": [True]},
    }[rows]
    good = {"prompt": "a", "chosen": "b", "rejected": "c"} if "chosen" in bad else good
    if words.startswith("tokens in both"):
        good = bad | {"rejected": [{"role": "assistant", "content": "c"}]}
    path, tokenizer = write([good, bad, good]), make_tokenizer()
    with pytest.raises(DataError) as caught:
        prepared(path, tokenizer, rows)
    assert str(caught.value).startswith(f"{path}:2: ") and words in str(caught.value)
    train = prepared(path, tokenizer, rows, on_error="skip").train
    assert train.reading.skipped == 1 and words in train.reading.errors[0] and set(train.rows.tolist()) == {0, 2}


def test_a_prompt_of_virtual_tokens_takes_room(make_tokenizer, write):
    row = {"prompt": "the " * 40, "chosen": "b", "rejected": "c"}
    config = dataclasses.replace(CONFIG, path=write([row]), max_length=48)
    tokenizer = make_tokenizer()
    train = data.prepare(config, tokenizer, rows="pairs").train
    assert len(train) == 2
    batch = data.Loader(train, config, batch_rows=1, reserved=4).batch(0)
    first = batch["segments"][0] == 1
    assert batch["positions"][0, first].tolist() == list(range(int(first.sum())))
    assert int(first.sum()) == min(int(train.offsets[1]), 44) + 4
    with pytest.raises(DataError, match="leaves nothing of `chosen` in a window of 38"):
        data.prepare(config, tokenizer, rows="pairs", reserved=10)


def test_packed_pairs_with_virtual_tokens(make_tokenizer, write):
    config = dataclasses.replace(CONFIG, path=write(some_pairs(20)), max_length=128)
    train = data.prepare(config, make_tokenizer(), rows="pairs", reserved=5).train
    found = [
        tuple(tokens[5:])
        for batch in data.Loader(train, config, batch_rows=2, epochs=1, reserved=5)
        for *_, tokens, _, _ in sequences(batch)
    ]
    bounds = zip(train.offsets[:-1], train.offsets[1:], strict=True)
    assert sorted(found) == sorted(tuple(train.tokens[a:b].tolist()) for a, b in bounds)


def test_what_belongs_together_is_left_out_together(make_tokenizer, write):
    """Of a pair that has nothing to learn on one side; of a row that is bad for one of its completions."""
    train = prepared(write(some_pairs(3)), make_tokenizer(), "pairs").train
    loss = train.loss.copy()
    loss[train.offsets[3] : train.offsets[4]] = False  # the rejected one of the second pair
    found = pack.pieces(dataclasses.replace(train, loss=loss), 512, "truncate")
    assert found.start.tolist() == train.offsets[[0, 1, 4, 5]].tolist() and found.dropped_unlearnt == 2
    rows = [
        {"prompt": "the ca", "chosen": "t sat", "rejected": " on a mat"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    tokenizer = make_tokenizer(kind="metaspace")
    whole = prepared(write(rows), tokenizer, "labelled").train
    given = [int(np.argmax(whole.loss[a:b])) for a, b in zip(whole.offsets[:2], whole.offsets[1:3], strict=True)]
    assert given[0] < given[1]  # the last of the prompt merges with the first of the chosen completion
    train = prepared(write(rows), tokenizer, "labelled", max_length=given[1], on_error="skip").train
    assert train.rows.tolist() == [1, 1] and train.reading.skipped == 1


def test_prompts_that_differ_are_refused(make_tokenizer, write):
    asks = [[{"role": "user", "content": text}, {"role": "assistant", "content": "b"}] for text in ("a", "x")]
    path = write([{"chosen": asks[0], "rejected": asks[1]}])
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: `chosen, rejected`: got .* before chosen and .* before rejected"
    ):
        prepared(path, make_tokenizer(), "pairs")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": "wrapped"}, "`data.packing`: got wrapped, for an objective on pairs"),
        ({"overlong": "split"}, "`data.overlong`: got split"),
        ({"loss_on": "all"}, "`data.loss_on`: got all"),
        ({"format": "alpaca"}, "`data.format`: got 'alpaca'"),
    ],
)
def test_settings_that_make_no_sense_for_pairs(make_tokenizer, write, options, words):
    with pytest.raises(DataError, match=words.replace(".", r"\.")):
        prepared(write(some_pairs(2)), make_tokenizer(), "pairs", **options)


@pytest.mark.parametrize(("rows", "workers"), [("pairs", 1), ("labelled", 0), ("steps", 0)])
def test_exact_resume_and_workers(make_tokenizer, write, rows, workers, monkeypatch):
    from jaxft.data import examples

    monkeypatch.setattr(examples, "CHUNK", 4)
    solutions = [{"prompt": "a", "completions": ["b"] * (1 + i % 3), "labels": [True] * (1 + i % 3)} for i in range(14)]
    path = write(solutions if rows == "steps" else some_pairs(14))
    tokenizer = make_tokenizer()
    options = {"epochs": 2, "batch_rows": 4, "packing": "none"}
    batches = list(loader_of(path, tokenizer, rows, **options))
    other = loader_of(path, tokenizer, rows, workers=workers, **options)
    for _ in range(3):
        next(other)
    again = loader_of(path, tokenizer, rows, **options)
    again.restore(json.loads(json.dumps(other.state())))
    for mine, theirs in zip(again, batches[3:], strict=True):
        assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
    if rows == "labelled":
        state = other.state()
        assert state["examples"] != loader_of(path, tokenizer, "pairs").state()["examples"]


def test_held_out_pairs_stay_whole(make_tokenizer, write):
    for rows in ("pairs", "labelled"):
        made = prepared(write(some_pairs(20)), make_tokenizer(), rows, eval_fraction=0.25)
        assert len(made.train) == 30 and len(made.held_out) == 10
        for part in (made.train, made.held_out):
            assert np.array_equal(part.rows[::2], part.rows[1::2])
            if rows == "labelled":
                assert part.columns["label"].tolist() == [True, False] * (len(part) // 2)


def test_tokens_are_digested_as_ever(make_tokenizer, write, chats):
    """A cursor of sft belongs to tokens, masks and offsets alone, and its batches hold nothing new."""
    path, tokenizer = write(chats(10)), make_tokenizer()
    train = data.prepare(dataclasses.replace(CONFIG, path=path), tokenizer).train
    whole = b"".join(array.tobytes() for array in (train.tokens, train.loss, train.offsets))
    assert train.digest() == hashlib.blake2b(whole, digest_size=16).hexdigest()
    assert loader_of(path, tokenizer, "tokens").batch(0).keys() == {"tokens", "positions", "segments", "loss_mask"}


def test_the_report_and_the_preview(make_tokenizer, write):
    from rich.console import Console

    def shown(path, rows, **options):
        console = Console(color_system=None, width=200, record=True, file=io.StringIO())
        config = dataclasses.replace(CONFIG, path=path, shuffle=False, **options)
        data.preview(config, make_tokenizer(), console, rows=1, form=rows)
        return console.export_text()

    chat = [{"role": "user", "content": "what"}]
    reply = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    path = write([{"prompt": chat, "chosen": reply("yes"), "rejected": reply("no"), "margin": 1.5}])
    text = shown(path, "pairs")
    assert "prompt      <|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n" in text
    assert "chosen      ⟦yes<|im_end|>⟧\n" in text and "rejected    ⟦no<|im_end|>⟧\n" in text
    assert "margin      1.5" in text and "1 pairs of 1 rows read" in text
    assert "training data (preference)" in text
    report = loader_of(path, make_tokenizer(), "pairs").report()
    given, chosen, rejected = (report.parts[name][50] for name in ("a prompt", "chosen", "rejected"))
    assert report.tokens == 2 * given + chosen + rejected
    assert any(line.startswith("tokens of chosen: p0") for line in report.lines())
    text = shown(path, "labelled")
    assert "desirable   ⟦yes<|im_end|>⟧" in text and "undesirable ⟦no<|im_end|>⟧" in text
    path = write([{"prompt": "it", "completions": ["one", "two"], "labels": [True, False]}], "steps.jsonl")
    text = shown(path, "steps")
    assert "prompt      it\n" in text and "right       ⟦one\n⟧" in text and "wrong       ⟦two\n⟧" in text
