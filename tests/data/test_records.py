"""Reading: every kind of source gives the same rows, each with its file and line."""

import csv
import json
import subprocess
import sys

import pytest

from jaxft.data import records
from jaxft.data.errors import DataError

ROWS = [{"prompt": f"ask {i},\nplease", "completion": f"answer {i} é"} for i in range(5)]


def read(path, split="train", limit=None, columns=None):
    source = records.read(str(path), split, None, limit, columns or {})
    return source.rows(0, len(source))


@pytest.fixture
def every_kind(tmp_path):
    """A path for every kind of source that holds ROWS."""
    import datasets

    jsonl, js, table = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.csv"
    jsonl.write_text("\n".join(json.dumps(row) for row in ROWS))  # no line break at the end
    js.write_text(json.dumps(ROWS, indent=2))
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "splits")
    kinds = {"jsonl": jsonl, "json": js, "csv": table, "parquet": tmp_path / "a.parquet"}
    return kinds | {"saved": tmp_path / "saved", "splits": tmp_path / "splits"}


def test_all_kinds_give_the_same_rows(every_kind, monkeypatch, tmp_path):
    for kind, path in every_kind.items():
        assert [row.fields for row in read(path)] == ROWS, kind
    assert [row.where for row in read(every_kind["jsonl"])][1:3] == [f"{every_kind['jsonl']}:{n}" for n in (2, 3)]
    assert read(every_kind["json"])[1].where == f"{every_kind['json']}:6"
    assert read(every_kind["csv"])[1].where == f"{every_kind['csv']}:4"
    assert read(every_kind["parquet"])[1].where == f"{every_kind['parquet']}:row 2"
    assert len(read(every_kind["splits"], split="test")) == 1


def test_several_files_limit_and_slices(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n\n' for i in range(4)))
    source = records.read([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], "train", None, 7, {})
    assert len(source) == 7
    assert [row.fields["text"] for row in source.rows(2, 6)] == ["a2", "a3", "b0", "b1"]
    assert source.rows(5, 6)[0].where.endswith("b.jsonl:3")  # blank lines count as lines
    assert len(read(tmp_path / "*.jsonl")) == 8
    assert len(read(tmp_path)) == 8


def test_lines_are_found_whatever_part_of_a_file_is_in_memory(tmp_path, monkeypatch):
    lines = ['{"text": "a"}', "", "  \t", '{"text": "b\\nb"}\r', "bad", '{"text": "c"}']
    for end in ("", "\n", "\n \n"):
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + end, newline="")
        found = []
        for size in (2**20, 1, 5, 14):
            monkeypatch.setattr(records, "BLOCK", size)
            found.append([(row.where, getattr(row, "fields", None)) for row in read(tmp_path / "a.jsonl")])
        texts = [None if fields is None else fields["text"] for _, fields in found[0]]
        assert texts == ["a", "b\nb", None, "c"] and found[0][3][0].endswith(":6")
        assert found[1:] == [found[0]] * 3


def test_a_text_file_is_a_document(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n{name}")
    assert [row.fields["text"] for row in read(tmp_path)] == ["a\n\na", "b\n\nb"]
    assert read(tmp_path / "*.txt")[1].where == str(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    assert "not UTF-8" in str(read(tmp_path / "c.txt")[0])
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}\n')
    assert [row.fields["text"] for row in read(tmp_path)] == ["row"]  # the texts are about the data


def test_directory_with_splits(tmp_path):
    (tmp_path / "train-00000.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "test-00000.jsonl").write_text('{"text": "b"}\n')
    assert [row.fields["text"] for row in read(tmp_path)] == ["a"]
    assert [row.fields["text"] for row in read(tmp_path, split="test")] == ["b"]
    with pytest.raises(DataError, match=r"data\.split.*'dev'"):
        read(tmp_path, split="dev")


def test_bad_lines_are_errors_in_place(write):
    path = write(['{"text": "a"}', '{"text": ', "[1]", '{"text": "b"}'])
    rows = read(path)
    assert [isinstance(row, DataError) for row in rows] == [False, True, True, False]
    assert str(rows[1]).startswith(f"{path}:2: got malformed JSON") and "on_error=skip" in str(rows[1])
    assert str(rows[2]).startswith(f"{path}:3: got JSON of type list")


def test_json_array_says_the_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n {"text": }\n]')
    with pytest.raises(DataError, match=r"a\.json:3: got malformed JSON"):
        read(path)
    path.write_text('{"text": "a"}\n{"text": "b"}\n')  # jsonl under the name of json
    assert len(read(path)) == 2


def test_csv_with_a_wrong_number_of_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\nc,d,e\n")
    assert str(read(path)[1]).startswith(f"{path}:3: got 3 cells; expected 2")


def test_columns_are_renamed(write):
    path = write([{"question": "q", "answer": "a", "prompt": "old"}])
    (row,) = read(path, columns={"question": "prompt", "answer": "completion"})
    assert row.fields == {"prompt": "q", "completion": "a"}
    assert "`reply`" in str(read(path, columns={"reply": "completion"})[0])


def test_nothing_there_and_offline_hub(tmp_path):
    with pytest.raises(DataError, match="nothing there"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"taken for a hub name.*offline"):
        read("nobody/nothing-here")
    (tmp_path / "a.doc").write_text("hello")
    with pytest.raises(DataError, match=r"suffix '\.doc'"):
        read(tmp_path / "a.doc")


def test_jsonl_needs_neither_datasets_nor_pyarrow(write):
    path = write([{"text": "a"}])
    code = (
        "import sys; from jaxft import data; from jaxft.data import records\n"
        f"assert len(records.read({path!r}, 'train', None, None, {{}}).rows(0, 1)) == 1\n"
        "heavy = 'datasets pyarrow pandas grain transformers jax rich jinja2'.split()\n"
        "assert not [name for name in heavy if name in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nulls_that_arrow_adds_are_dropped(tmp_path):
    import datasets

    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    datasets.Dataset.from_list([{"messages": messages, "tools": None}]).to_parquet(tmp_path / "a.parquet")
    (row,) = read(tmp_path / "a.parquet")
    assert row.fields == {"messages": [messages[0], {"role": "assistant", "tool_calls": [call]}]}


def test_half_a_character_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42"}\n{"text": "\\ud83d"}\n')
    (tmp_path / "a.json").write_text('[{"text": "\\ud83d\\ude42"},\n{"text": "\\ud83d"}]')
    for name in ("a.jsonl", "a.json"):
        good, bad = read(tmp_path / name)
        assert good.fields == {"text": "\U0001f642"}
        assert isinstance(bad, DataError) and "lone surrogate" in str(bad) and f"{name}:2" in str(bad)


def test_files_that_are_not_what_their_names_say(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\n\u00e9\n".encode("latin-1"))
    (tmp_path / "a.json").write_bytes('[{"text": "\u00e9"}]'.encode("latin-1"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut short")
    for name, message in {"a.csv": "not UTF-8", "a.json": "not UTF-8", "a.parquet": "a whole parquet file"}.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
