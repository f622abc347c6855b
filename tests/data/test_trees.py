"""OpenAssistant's trees, flat and nested: paths to learn, ranked siblings to compare."""

import dataclasses
import json

import pytest

from jaxft import data
from jaxft.data import records, trees
from jaxft.data.errors import DataError

BASE = {  # OpenAssistant/oasst1 and oasst2, the columns of a flat file
    "user_id": "40bb",
    "created_date": "2023-02-05T14:23:50.983374+00:00",
    "lang": "en",
    "review_count": 3,
    "review_result": True,
    "deleted": False,
    "synthetic": False,
    "model_name": None,
    "detoxify": {"toxicity": 0.0002},
    "message_tree_id": "q",
    "tree_state": "ready_for_export",
    "emojis": {"name": ["+1"], "count": [1]},
    "labels": None,
}
# q ─ a (rank 1) ─ b ─ c (0), d (1)
#   ├ e (rank 0) ─ f
#   └ g (rank 2, deleted) ─ h
TREE = [("q", None, None), ("a", "q", 1), ("b", "a", None), ("c", "b", 0), ("d", "b", 1)]
TREE += [("e", "q", 0), ("f", "e", None), ("g", "q", 2), ("h", "g", None)]


def message(name, parent, rank, changes=None):
    role = "prompter" if name in "qbfh" else "assistant"
    own = {"message_id": name, "parent_id": parent, "text": f"say {name}", "role": role, "rank": rank}
    return BASE | own | {"deleted": name == "g"} | (changes or {})


def read(path, paths="best", pairs=False, limit=None):
    source = records.read(path, "train", None, limit, {})
    found = trees.flatten(source, paths, pairs)
    return found.rows(0, len(found))


def spoken(messages):
    return "".join(message["content"][-1] for message in messages)


@pytest.fixture
def flat(write):
    return write([message(*each) for each in TREE])


def test_paths(flat):
    assert [(spoken(row.fields["messages"]), row.where) for row in read(flat)] == [("qe", f"{flat}:6")]
    found = read(flat, "all")
    assert [spoken(row.fields["messages"]) for row in found] == ["qe", "qabc", "qabd"]
    assert [message["role"] for message in found[1].fields["messages"]] == ["user", "assistant"] * 2
    assert found[1].where == f"{flat}:4" and found[1].fields["lang"] == "en"
    assert len(read(flat, "all", limit=2)) == 2  # of what comes out: messages are not cut from trees


def test_spam_is_left_out(write):
    rows = [message(*each) for each in TREE]
    rows[3]["review_result"] = False
    assert [spoken(row.fields["messages"]) for row in read(write(rows), "all")] == ["qe", "qabd"]


def test_ranked_siblings(flat, write):
    def compared(path, paths):
        rows = read(path, paths, pairs=True)
        return [tuple(spoken(row.fields[name]) for name in ("prompt", "chosen", "rejected")) for row in rows]

    assert compared(flat, "best") == [("q", "e", "a"), ("qab", "c", "d")]
    more = [message("i", "q", 2), message("j", "q", None), message("k", "q", 2)]
    path = write([*(message(*each) for each in TREE), *more], "more.jsonl")
    assert compared(path, "best") == [("q", "e", "k"), ("qab", "c", "d")]
    every = [("q", "e", "a"), ("q", "e", "i"), ("q", "e", "k"), ("q", "a", "i"), ("q", "a", "k")]
    assert compared(path, "all") == [*every, ("qab", "c", "d")]  # equal ranks, and none, are not compared


def test_nested_trees_are_the_same(flat, write):
    """A `.trees.jsonl` file holds a tree a line."""
    nodes = {name: message(name, parent, rank) | {"replies": []} for name, parent, rank in TREE}
    for name, parent, _ in TREE:
        del nodes[name]["parent_id"]
        if parent:
            nodes[parent]["replies"].append(nodes[name])
    path = write([{"message_tree_id": "q", "tree_state": "ready_for_export", "prompt": nodes["q"]}], "trees.jsonl")
    for paths in ("best", "all"):
        for pairs in (False, True):
            names = ("prompt", "chosen", "rejected") if pairs else ("messages",)
            mine, theirs = (
                [[row.fields[name] for name in names] for row in read(file, paths, pairs)] for file in (path, flat)
            )
            assert mine == theirs and mine


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parent_id": "z"}, "`parent_id`: got 'z', which is no message of the data"),
        ({"message_id": "q"}, "`message_id`: got 'q'; expected one message of this id"),
        ({"message_id": 5}, "`message_id`: got 5; expected a string"),
        ({"role": "system"}, "`role`: got 'system'; expected one of prompter, assistant"),
        ({"role": "prompter"}, "`role`: got prompter in answer to itself"),
        ({"parent_id": None}, "`role`: got assistant as the first message"),
        ({"rank": "best"}, "`rank`: got 'best'"),
        ({"parent_id": "x"}, "`parent_id`: got 'x', in a circle"),
    ],
)
def test_bad_messages_name_file_and_line(changes, words, write, make_tokenizer):
    rows = [message(*each) for each in TREE] + [message("x", "q", 3, changes)]
    path = write(rows, "bad.jsonl")
    config = data.DataConfig(path=path, template="chatml")
    with pytest.raises(DataError) as caught:
        data.prepare(config, make_tokenizer())
    assert str(caught.value).startswith(f"{path}:10: ") and words in str(caught.value)
    prepared = data.prepare(dataclasses.replace(config, on_error="skip"), make_tokenizer())
    assert prepared.train.reading.skipped == 1 and len(prepared.train) == 1 and prepared.format == "messages"


def test_trees_are_recognised(flat, make_tokenizer):
    """By their columns, for sft and for preferences; `text` alone would be taken for plain text."""
    tokenizer = make_tokenizer()
    config = data.DataConfig(path=flat, template="chatml", paths="all")
    prepared = data.prepare(config, tokenizer)
    assert len(prepared.train) == 3 and "say q" in tokenizer.decode(prepared.train.tokens[:40])
    (prompt, *_) = data.prompts(prepared.train.source_rows(), prepared.format, config, tokenizer)
    assert prompt.answer == "say e"
    pairs = data.prepare(config, tokenizer, rows="pairs")
    assert len(pairs.train) == 4 and pairs.format == "preference"
    assert json.dumps(pairs.train.source_rows()[0].fields["chosen"][0]["content"]) == '"say e"'


def test_trees_are_held_out_whole(write, make_tokenizer):
    rows = []
    for i in range(8):
        ids = {name: f"{name}{i}" for name, _, _ in TREE}
        rows += [message(*each) | {"message_id": ids[each[0]], "parent_id": ids.get(each[1])} for each in TREE]
    for wanted, trees_held in (("tokens", 1), ("pairs", 2)):  # of three rows, and of two
        config = data.DataConfig(path=write(rows), template="chatml", paths="all", eval_examples=3)
        made = data.prepare(config, make_tokenizer(), rows=wanted)
        held, kept = (
            {row.fields["message_tree_id"] for row in part.source_rows()} for part in (made.held_out, made.train)
        )
        assert not held & kept and len(held | kept) == 8 and len(held) == trees_held
