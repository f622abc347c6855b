"""Prompts with their columns, for objectives on what the policy writes."""

import json
from pathlib import Path

import pytest
import transformers

from jaxft.data import DataConfig, DataError, questions

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


def written(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def ask(text):
    return [{"role": "user", "content": text}]


def test_a_prompt_keeps_every_other_column_of_its_row(tokenizer, tmp_path):
    rows = [
        {"prompt": ask("Add 2 and 3"), "answer": "5", "tests": ["a", "b"]},
        {"prompt": ask("Add 1 and 1"), "answer": 2},
        {"prompt": "1 + 1 =", "completion": "2"},
    ]
    made = questions.prepare(DataConfig(path=written(tmp_path, *rows[:2])), tokenizer, 64)
    assert [prompt.columns for prompt in made.train] == [{"answer": "5", "tests": ["a", "b"]}, {"answer": 2}]
    assert [prompt.answer for prompt in made.train] == ["5", "2"] and made.columns == ("answer", "tests")
    assert made.train[0].given == ask("Add 2 and 3") and "Add 2 and 3" in made.train[0].text
    plain = questions.prepare(DataConfig(path=written(tmp_path, rows[2])), tokenizer, 64).train[0]
    assert (plain.text, plain.answer, plain.columns) == ("1 + 1 =", "2", {"answer": "2", "completion": "2"})


def test_the_last_turn_of_a_chat_is_the_answer(tokenizer, tmp_path):
    reply = [{"role": "assistant", "content": "5"}]
    made = questions.prepare(DataConfig(path=written(tmp_path, {"messages": ask("2 + 3?") + reply, "level": 1})),
                             tokenizer, 64)  # fmt: skip
    assert made.train[0].given == ask("2 + 3?") and made.train[0].columns == {"answer": "5", "level": 1}


def test_a_part_is_held_out_by_content(tokenizer, tmp_path):
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(20)]
    one = questions.prepare(DataConfig(path=written(tmp_path, *rows), eval_examples=5), tokenizer, 64)
    other = questions.prepare(DataConfig(path=written(tmp_path, *rows[::-1]), eval_examples=5), tokenizer, 64)
    assert len(one.train) == 15 and len(one.held_out) == 5
    assert {p.text for p in one.held_out} == {p.text for p in other.held_out}
    assert not {p.text for p in one.held_out} & {p.text for p in one.train}


@pytest.mark.parametrize("row, told", [
    ({"prompt": "a b c d e f g h", "answer": "1"}, "rows.jsonl:2: `prompt`: got a prompt of"),
    ({"prompt": "a", "completions": ["x"]}, "`completions`: got a column of that name"),
    ({"answer": "1"}, "`prompt`: got nothing"),
])  # fmt: skip
def test_a_row_that_cannot_be_asked_is_named_or_skipped(tokenizer, tmp_path, row, told):
    path = written(tmp_path, {"prompt": "a", "answer": "1"}, row)
    with pytest.raises(DataError) as caught:
        questions.prepare(DataConfig(path=path), tokenizer, 5)
    assert told in str(caught.value)
    made = questions.prepare(DataConfig(path=path, on_error="skip"), tokenizer, 5)
    assert (len(made.train), made.skipped) == (1, 1)


def test_text_alone_asks_nothing(tokenizer, tmp_path):
    with pytest.raises(DataError, match="expected rows with a `prompt`, or chats"):
        questions.prepare(DataConfig(path=written(tmp_path, {"text": "once"})), tokenizer, 64)
