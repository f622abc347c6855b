"""jaxft rank: what is typed becomes preferences that dpo trains on, once, whatever happens in between."""

import fcntl
import io
import json

import pytest
import transformers

from jaxft import cli, data
from jaxft.border.errors import ConfigError
from jaxft.cli import judgements
from jaxft.cli.judgements import Book

PROMPTS = ["Sort: 3 1 2", "Say hi", "Spell dog"]


@pytest.fixture
def ask(capsys, monkeypatch, tiny, tmp_path):
    """A function of what is typed and of further words: (exit code, stdout, stderr) of `jaxft rank`."""
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": "x"} for text in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(typed, *words):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        own = ["model.dtype=float32", "generate.max_new_tokens=4", f"data.path={tmp_path / 'prompts.jsonl'}", "--n", 3]
        code = cli.main([str(w) for w in ("rank", tiny, *own, "--out", tmp_path / "out.jsonl", *words)])
        return code, *capsys.readouterr()

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("2 1 3", [[1], [0], [2]]),
        ("3>1 > 2", [[2], [0], [1]]),
        ("2 = 1, 3", [[1, 0], [2]]),
        ("1=2=3", [[0, 1, 2]]),
    ],
)
def test_orders(text, wanted):
    assert judgements.order(text, 3) == wanted


@pytest.mark.parametrize("text", ["1 2", "1 2 3 4", "1 2 2", "0 1 2", "1 2 x", "1 = = 2 3", "1 2 -3", ""])
def test_what_is_no_order(text):
    with pytest.raises(ValueError, match="expected each of 1 to 3 once"):
        judgements.order(text, 3)


def test_a_session_and_the_next(ask, tiny, tmp_path):
    """By hand: 2 1 3 is three preferences, 2=1 3 is two; skipped and ranked prompts are not asked again."""
    code, out, err = ask("2 1 3\nnonsense\n2=1 3\nq\n")
    assert code == 0, err
    assert "expected each of 1 to 3 once" in out and "2 prompts ranked, 5 preferences" in out
    records = read(tmp_path / "out.ranked.jsonl")
    assert [record["prompt"][0]["content"] for record in records] == PROMPTS[:2]
    a, b, c = (answer["text"] for answer in records[0]["answers"])
    d, e, f = (answer["text"] for answer in records[1]["answers"])
    found = read(tmp_path / "out.jsonl")
    said = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found]
    assert said == [(b, a), (b, c), (a, c), (e, f), (d, f)]
    assert [row["prompt"][0]["content"] for row in found] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 2

    code, out, _ = ask("s\n")
    assert code == 0 and out.startswith("2 of 3 prompts are decided") and PROMPTS[0] not in out and PROMPTS[2] in out
    assert read(tmp_path / "out.jsonl") == found and read(tmp_path / "out.ranked.jsonl")[2]["skipped"]
    code, out, _ = ask("1 2 3\n")
    assert code == 0 and PROMPTS[2] not in out  # nothing is left to ask

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    prepared = data.prepare(data.DataConfig(path=str(tmp_path / "out.jsonl"), max_length=128), tokenizer, "pairs")
    assert len(prepared.train) == 10 and prepared.format == "preference"


def test_taking_back(ask, tmp_path):
    """`u` goes back one decision each time, in both files; the answers shown again are the same."""
    code, out, err = ask("u\n1 2 3\n3 2 1\nu\nu\n1=2=3\n2 1 3\nskip\n")
    assert code == 0, err
    assert "nothing to take back" in out and "2 prompts ranked, 3 preferences" in out
    records = read(tmp_path / "out.ranked.jsonl")
    assert [record.get("order") for record in records] == [[[0, 1, 2]], [[1], [0], [2]], None]
    assert {row["prompt"][0]["content"] for row in read(tmp_path / "out.jsonl")} == {PROMPTS[1]}


def test_prompts_of_the_command_line(ask, tmp_path):
    code, out, err = ask("2 1 3\n1 2 3\n", "--prompt", "one", "--prompt", "one", "--prompt", "two", "--limit", 1)
    assert code == 0 and "1 prompts ranked, 3 preferences" in out, err
    assert read(tmp_path / "out.jsonl")[0]["prompt"] == [{"role": "user", "content": "one"}]
    for words, said in (
        (["generate.temperature=0"], "the same answer every time"),
        (["--n", 1], "--n: got 1; expected at least 2"),
        (["--out", "x.txt"], "expected a file that ends in .jsonl"),
        (["data.path="], "no prompt; say data.path"),
    ):
        code, _, err = ask("", *[word if word != "data.path=" else "data.path=''" for word in words])
        assert code == 2 and said in err


ANSWERS = [{"text": f" {word}", "finished": True} for word in ("a", "b", "c")]


def record(prompt, order):
    return {"prompt": prompt, "answers": ANSWERS, "order": order}


def test_what_was_cut_short_is_made_up_for(tmp_path):
    """A process that died between the two files, or within a line."""
    out = tmp_path / "p.jsonl"
    with Book(out) as book:
        book.add(record("one", [[0], [1, 2]]))
        book.add(record("two", [[2], [1], [0]]))
    whole, ranked = out.read_bytes(), (tmp_path / "p.ranked.jsonl").read_bytes()
    rows = read(out)
    assert rows[0] == {"prompt": "one", "chosen": " a", "rejected": " b"} and len(rows) == 5
    lines = whole.splitlines(keepends=True)
    for kept in (b"".join(lines[:2]), b"".join(lines[:3]), b"".join(lines[:3]) + lines[3][:9]):
        out.write_bytes(kept)
        with Book(out) as book:
            assert book.preferences == 5 and len(book.done) == 2
        assert out.read_bytes() == whole
    (tmp_path / "p.ranked.jsonl").write_bytes(ranked + b'{"prompt": "thr')
    with Book(out) as book:
        assert len(book.done) == 2
    assert (tmp_path / "p.ranked.jsonl").read_bytes() == ranked
    edited = b"".join(lines[1:])
    out.write_bytes(edited)  # somebody took a row out: that stays so
    with Book(out) as book:
        book.add(record("three", [[0, 1, 2]]))
    assert out.read_bytes() == edited


def test_files_of_others(tmp_path):
    out = tmp_path / "p.jsonl"
    out.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(ConfigError, match="it was not made by jaxft rank"):
        Book(out)
    ranked = tmp_path / "q.ranked.jsonl"
    ranked.write_text('{"prompt": "p"}\n{"order": 3}\n')
    with pytest.raises(ConfigError, match=r"q\.ranked\.jsonl:2: no decision"):
        Book(tmp_path / "q.jsonl")
    ranked.write_text("")
    with ranked.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is writing"):
            Book(tmp_path / "q.jsonl")
