"""Several sources as one data set: whose rows a batch has, in which parts, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxft import data
from jaxft.data.config import MixConfig, SourceConfig
from jaxft.data.errors import DataError
from jaxft.data.mixture import size_parts

CONFIG = data.DataConfig(template="chatml", max_length=64)


@pytest.fixture
def paths(write, chats):
    return {"a": write(chats(30, seed=1), "a.jsonl"), "b": write(chats(9, seed=2), "b.jsonl")}


def mixed(paths, mix=MixConfig(), own=(), **options):  # noqa: B008 (frozen)
    """A config of sources at these paths; `own`: settings of single sources."""
    named = {name: SourceConfig(path, **dict(own).get(name, {})) for name, path in paths.items()}
    return dataclasses.replace(CONFIG, sources=named, mix=mix, **options)


def loader_of(config, tokenizer, batch_rows=4, epochs=None, rows="tokens"):
    return data.Loader(data.prepare(config, tokenizer, rows).train, config, batch_rows=batch_rows, epochs=epochs)


def documents(batch, row):
    """The documents of a row as token lists."""
    segments = batch["segments"][row]
    return [tuple(batch["tokens"][row][segments == s].tolist()) for s in range(1, segments.max(initial=0) + 1)]


def every(path, tokenizer, **options):
    """The documents of a file on its own, cut as in the mixture."""
    config = dataclasses.replace(CONFIG, path=path, **options)
    made = data.Loader(data.prepare(config, tokenizer).train, config, batch_rows=1, epochs=1)
    return {document for batch in made for document in documents(batch, 0)}


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_rows_are_of_the_sources_they_name(make_tokenizer, paths, packing):
    """Of four rows three are of a; each row holds documents of its own source alone, and an epoch of a source is all of
    it, each document once."""
    tokenizer = make_tokenizer()
    own = {name: every(path, tokenizer) for name, path in paths.items()}
    assert not own["a"] & own["b"]
    config = mixed(paths, own=[("a", {"weight": 3})], packing=packing)
    loader = loader_of(config, tokenizer)
    assert loader.batches_per_epoch == -(-len(loader.plan) // 4)
    seen = {"a": [], "b": []}
    for _ in range(60):
        batch = next(loader)
        assert batch["source"].tolist().count(0) == 3 and batch["source"].dtype == np.int32
        if packing == "none":
            batch |= {"segments": (np.cumsum(batch["positions"][:, ::-1], 1)[:, ::-1] > 0).astype(int)}
        for row, source in enumerate(batch["source"]):
            seen["ab"[source]].append(documents(batch, row))
    for (name, found), plan in zip(seen.items(), loader.mixed.plans, strict=True):
        if packing == "none":
            continue  # the last token of a document has the position of padding there
        for turn in range(len(found) // len(plan)):
            epoch = [d for row in found[turn * len(plan) : (turn + 1) * len(plan)] for d in row]
            assert len(epoch) == len(set(epoch)) and set(epoch) == own[name]
        assert found[: len(plan)] != found[len(plan) : 2 * len(plan)]  # another order


def test_resuming_is_exact(make_tokenizer, paths):
    """From the cursor alone, in a schedule, at every batch."""
    tokenizer = make_tokenizer()
    mix = MixConfig(schedule={0: {"a": 1, "b": 0}, 6: {"a": 1, "b": 3}})
    config = mixed(paths, mix)
    loader, states, batches = loader_of(config, tokenizer), [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(loader.state())))
        batches.append(next(loader))
    for done in (0, 5, 11):
        other = loader_of(config, tokenizer)
        other.restore(states[done])
        for batch in batches[done:]:
            again = next(other)
            assert again.keys() == batch.keys() and all(np.array_equal(again[n], batch[n]) for n in batch)
        other.close()
    loader.close()
    for changed in (mixed(paths, own=[("b", {"weight": 2})]), mixed({"c": paths["a"], "b": paths["b"]})):
        with pytest.raises(DataError, match=r"data cursor: (parts|sources)"):
            loader_of(changed, tokenizer).restore(states[3])


def test_one_source_is_what_it_is_without_a_mixture(make_tokenizer, write, chats):
    path, tokenizer = write(chats(12)), make_tokenizer()
    plain = every(path, tokenizer)
    alone = loader_of(mixed({"only": path}), tokenizer)
    batch = [alone.batch(i) for i in range(alone.batches_per_epoch)]
    assert {d for b in batch for row in range(4) for d in documents(b, row)} == plain


def test_parts_by_size():
    """T5's worked rule, min(n, K), and n^(1/T), by hand."""
    size = np.array([100.0, 900.0, 10_000.0])
    np.testing.assert_allclose(size_parts(size, "proportional", 2.0, None), size / 11_000)
    np.testing.assert_allclose(size_parts(size, "capped", 2.0, 1000), [0.05, 0.45, 0.5])
    np.testing.assert_allclose(size_parts(size, "temperature", 2.0, None), np.array([10, 30, 100]) / 140)
    np.testing.assert_allclose(size_parts(size, "temperature", 1.0, None), size / 11_000)
    np.testing.assert_allclose(size_parts(size, "temperature", 1e9, None), [1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_parts_are_of_what_training_sees(make_tokenizer, write, chats, unit):
    """Counted in the batches: capped at 12 of 30 and 9 examples, 12/21 of the examples seen are of a, however many of
    them share a row; proportional takes every example as often as any other."""
    long = [
        {"messages": [{"role": "user", "content": "cat " * 20}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(30)
    ]
    paths, tokenizer = {"a": write(long, "long.jsonl"), "b": write(chats(9, seed=2), "b.jsonl")}, make_tokenizer()

    def seen(mix):
        loader = loader_of(mixed(paths, mix), tokenizer)
        total = np.zeros(2)
        for number in range(200):
            batch = loader.batch(number)
            for source, segments in zip(batch["source"], batch["segments"], strict=True):
                total[source] += segments.max() if unit == "examples" else (segments > 0).sum()
        sizes = [len(p.pieces) if unit == "examples" else p.pieces.lengths.sum() for p in loader.mixed.plans]
        return total / total.sum(), np.array(sizes)

    part, size = seen(MixConfig(rule="proportional", unit=unit))
    # rows are whole and unequally full: after 200 batches a source is within some rows of its part
    np.testing.assert_allclose(part, size / size.sum(), atol=0.01)
    cap = 12 if unit == "examples" else 400
    part, size = seen(MixConfig(rule="capped", unit=unit, cap=cap))
    assert size[0] > cap  # else nothing is capped
    np.testing.assert_allclose(part, np.minimum(size, cap) / np.minimum(size, cap).sum(), atol=0.01)


def test_an_example_that_is_split_is_one(make_tokenizer, write):
    """Four documents of three rows and four of one are as many examples: of each as many are seen, so three times the
    rows."""
    texts = {"long": " ".join(["cat"] * 150), "short": "the cat"}
    tokenizer = make_tokenizer()
    size = len(tokenizer(texts["long"])["input_ids"])
    paths = {name: write([{"text": text}] * 4, f"{name}.jsonl") for name, text in texts.items()}
    options = {"packing": "none", "overlong": "split", "max_length": -(-(size + 1) // 3)}
    loader = loader_of(mixed(paths, MixConfig(rule="temperature", temperature=3.0), **options), tokenizer)
    assert [len(plan) for plan in loader.mixed.plans] == [12, 4]
    assert loader.report().shares(0)["long"][0] == pytest.approx(0.75)


def test_held_out_rows_come_once(make_tokenizer, paths):
    """Of each source its own held-out part; all of it once, spread evenly, whatever the weights."""
    config = mixed(paths, own=[("a", {"weight": 9, "eval_fraction": 0.3}), ("b", {"eval_examples": 4})], packing="none")
    prepared = data.prepare(config, make_tokenizer())
    held = data.Loader(prepared.held_out, dataclasses.replace(config, shuffle=False), batch_rows=5, epochs=1)
    batches = list(held)
    full = [batch["loss_mask"].any(1) for batch in batches]
    sources = np.concatenate([batch["source"][rows] for batch, rows in zip(batches, full, strict=True)])
    assert np.bincount(sources).tolist() == [9, 4] and len(batches) == 3
    assert {1} <= set(sources[:6].tolist())
    rows = [row["messages"][0]["content"] for row in (r.fields for r in prepared.held_out.source_rows())]
    assert len(rows) == 13
    tokens = np.concatenate([batch["tokens"][rows] for batch, rows in zip(batches, full, strict=True)])
    assert len({tuple(row) for row in tokens.tolist()}) == 13
    found = data.prompts_of(prepared.held_out, prepared.format, config, make_tokenizer(), 6)
    assert [prompt.source for prompt in found] == ["a", "b"] * 3


def test_pairs_of_two_sources(make_tokenizer, write):
    """Rows of pairs are alike whatever the source, and a margin must be everywhere or nowhere."""

    def preferences(number, start, **more):
        rows = [{"prompt": f"what {i}", "chosen": f" yes {i}", "rejected": f" no {i}", **more} for i in range(number)]
        return write(rows, f"{start}.jsonl")

    tokenizer = make_tokenizer()
    config = mixed({"a": preferences(6, "a"), "b": preferences(3, "b")})
    loader = loader_of(config, tokenizer, rows="pairs")
    for number in range(4):
        batch = loader.batch(number)
        assert batch["source"].shape == (4,) and batch["sequence_mask"].shape == (4, loader.plan.sequences)
        assert (batch["sequence_mask"].sum(1) == batch["segments"].max(1)).all()
    labelled = loader_of(config, tokenizer, rows="labelled")
    shapes = [{name: array.shape for name, array in labelled.batch(number).items()} for number in range(6)]
    assert all(each == shapes[0] for each in shapes) and shapes[0]["kl_tokens"][0] == 4
    for number in range(6):  # each prompt once more, with the completion of another sequence of the batch
        batch = labelled.batch(number)
        assert batch["kl_sequence_mask"].sum() == batch["sequence_mask"].sum()
    config = mixed({"a": preferences(6, "a"), "b": preferences(3, "c", margin=1.5)})
    with pytest.raises(DataError, match="columns none in a and margin in b"):
        data.prepare(config, tokenizer, "pairs")


def test_a_weight_of_zero(make_tokenizer, paths):
    tokenizer, none = make_tokenizer(), [("b", {"weight": 0})]
    with pytest.raises(DataError, match=r"`data.sources.b.weight`: got 0 for b; expected a weight above 0"):
        data.prepare(mixed(paths, own=none), tokenizer)
    loader = loader_of(mixed(paths, own=none, on_error="skip"), tokenizer)
    assert loader.mixed.mixture.names == ("a",)
    assert "! source b left out: its weight is 0" in loader.report().lines()
    both = [(name, {"weight": 0}) for name in paths]
    with pytest.raises(DataError, match="got 0 for a, b"):
        data.prepare(mixed(paths, own=both, on_error="skip"), tokenizer)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"path": "x.jsonl"}, "`data.path`: got 'x.jsonl'"),
        ({"limit": 3}, "`data.limit`: got 3"),
        ({"mix": MixConfig(rule="capped")}, "`data.mix.cap`: got None"),
        ({"mix": MixConfig(cap=3)}, "`data.mix.cap`: got 3; expected none"),
        ({"mix": MixConfig(rule="temperature", temperature=0)}, "`data.mix.temperature`: got 0"),
        ({"mix": MixConfig(schedule={0: {"a": 1}})}, "`data.mix.schedule.0`: got step 0 with a"),
        ({"mix": MixConfig(schedule={0: {"a": 1, "b": -1}})}, "`data.mix.schedule.0.b`: got -1"),
        ({"mix": MixConfig(schedule={5: {"a": 0, "b": 0}})}, "no weight above 0"),
        ({"mix": MixConfig(rule="proportional", schedule={0: {"a": 1, "b": 1}})}, "`data.mix.schedule`: got one"),
        ({"own": [("a", {"weight": 1})], "mix": MixConfig(rule="proportional")}, "`data.sources.a.weight`: got 1"),
        ({"own": [("a", {"weight": float("nan")})]}, "`data.sources.a.weight`: got nan"),
        ({"own": [("b", {"path": "nowhere.jsonl"})]}, "nowhere.jsonl: `data.sources.b.path`: got nothing there"),
        ({"own": [("b", {"format": "preference"}), ("a", {"format": "labelled"})]}, "`data.sources.a.format`"),
        ({"own": [("a", {"task": -1})]}, "`data.sources.a.task`: got -1"),
    ],
)
def test_what_is_refused(make_tokenizer, paths, change, said):
    change = dict(change)
    own = dict(change.pop("own", []))
    moved = {name: own.get(name, {}).pop("path", path) for name, path in paths.items()}
    with pytest.raises(DataError) as caught:
        data.prepare(mixed(moved, change.pop("mix", MixConfig()), own.items(), **change), make_tokenizer())
    assert said in str(caught.value)


def test_parts_of_nothing(make_tokenizer, paths):
    config = dataclasses.replace(CONFIG, path=paths["a"], mix=MixConfig(rule="proportional"))
    with pytest.raises(DataError, match=r"`data\.mix`: got settings of a mixture; expected data\.sources"):
        data.prepare(config, make_tokenizer())


def test_tokens_on_disk(make_tokenizer, paths, tmp_path):
    """`data.cache` keeps each source, told by templates too: the same batches."""
    own = [("b", {"prompts": ("{{ messages[0].content }} ||| {{ messages[1].content }}",)})]
    plain, cached = (mixed(paths, own=own, cache=cache) for cache in (None, str(tmp_path / "cache")))
    for _ in range(2):
        one, other = (loader_of(config, make_tokenizer()).batch(3) for config in (plain, cached))
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert len(list((tmp_path / "cache").iterdir())) == 4  # two sources, and their tokens and masks end to end


def test_tasks_and_templates_of_their_own(make_tokenizer, paths, write):
    """A source's number of the task, chat template and format are its own; what it does not say is as in `data`."""
    paths = {"a": paths["a"], "t": write([{"text": f"the cat sat {i}"} for i in range(4)], "t.jsonl")}
    config = mixed(paths, own=[("a", {"task": 2, "template": "plain"}), ("t", {"eval_examples": 1})], loss_on="last")
    prepared = data.prepare(config, make_tokenizer())
    assert prepared.format == "a: messages, t: text" and prepared.train.tasks[[0, -1]].tolist() == [2, 0]
    assert prepared.held_out is not None and [s.template for s in prepared.train.mixture.settings] == [
        "plain",
        "chatml",
    ]
    assert all(settings.loss_on == "last" for settings in prepared.train.mixture.settings)


def test_the_report_shows_the_parts(make_tokenizer, paths):
    """a has its part of three quarters, and goes round the faster the fewer rows it has."""
    loader = loader_of(mixed(paths, own=[("a", {"weight": 3})]), make_tokenizer())
    report = loader.report()
    rows = {name: len(plan) for name, plan in zip("ab", loader.mixed.plans, strict=True)}
    shares = report.shares(0)
    assert report.rows == sum(rows.values()) and report.sources["a"].reading.rows == 30
    assert shares["a"][0] == 0.75 and shares["a"][2] == pytest.approx(0.75 * report.rows / rows["a"])
    assert sum(share[1] for share in shares.values()) == pytest.approx(1)
    said = report.lines()
    assert said[0] == f"2 sources, {report.rows} rows an epoch" and "a: 30 examples of 30 rows read" in said
