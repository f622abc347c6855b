"""jaxft teach: answers of a teacher, judged, as rows that a student is trained on; resumable, every sample kept."""

import json

import pytest
import yaml

from jaxft import cli
from jaxft.cli import run as run_
from jaxft.cli import teach
from jaxft.rollout import generate, verify
from jaxft.rollout.verify import Sample, VerifyConfig
from tests.cli.test_pipeline import jaxft, pipeline

FUNCTION = """
def even(prompts, completions, **columns):
    assert columns["task"] == ["t"] * len(prompts)
    return [float(len(text) % 2 == 0) for text in completions]
"""


@pytest.fixture
def settings(tiny, tmp_path):
    """Seven prompts, and a function that likes every other answer of a random model."""
    rows = [{"prompt": [{"role": "user", "content": f"Spell {i}"}], "answer": str(i), "task": "t"} for i in range(7)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(FUNCTION)
    return {
        "teacher": {"path": str(tiny), "dtype": "float32"},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "generate": {"max_new_tokens": 6, "temperature": 1.0, "batch": 6},
        "samples": 3,
        "verify": {"function": f"{tmp_path / 'own.py'}:even", "finished": False},
        "keep": "all",
    }


def written(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def config(folder, settings):
    (folder / "teach.yaml").write_text(yaml.safe_dump(settings))
    return folder / "teach.yaml"


def test_every_sample_is_kept_and_what_passes_becomes_rows(capsys, settings, tmp_path):
    code, out, err = jaxft(capsys, "teach", config(tmp_path, settings), f"run_dir={tmp_path / 'a'}")
    assert code == 0, err
    records, rows = written(tmp_path / "a", "samples.jsonl"), written(tmp_path / "a", "rows.jsonl")
    assert [record["prompt"][0]["content"] for record in records] == [f"Spell {i}" for i in range(7)]
    samples = [sample for record in records for sample in record["samples"]]
    assert len(samples) == 21 and len({sample["text"] for sample in samples}) > 10
    for sample in samples:
        good = len(sample["text"]) % 2 == 0
        assert sample["score"] == good and (sample["failed"] == "" or not sample["kept"])
        assert (sample["failed"] == "") == (good and bool(sample["text"].strip()))
    expected = [
        {"prompt": record["prompt"], "completion": [{"role": "assistant", "content": sample["text"].strip()}]}
        for record in records
        for sample in record["samples"]
        if sample["kept"]
    ]
    assert rows == expected and 0 < len(rows) < 21
    assert f"{len(rows)} rows in" in out and "7 of 7 prompts" in out


def test_a_run_that_was_cut_asks_only_what_is_left(capsys, settings, tmp_path, monkeypatch):
    """In the middle of a line, and of the prompts that are answered together; it samples what it would have."""
    file = config(tmp_path, settings)
    for name in ("whole", "cut"):
        assert jaxft(capsys, "teach", file, f"run_dir={tmp_path / name}")[0] == 0
    cut = tmp_path / "cut"
    lines = (cut / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "samples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (cut / "rows.jsonl").unlink()
    code, _, err = jaxft(capsys, "teach", file, f"run_dir={cut}")
    assert code == 2 and "holds a run; go on with it (--resume)" in err
    code, _, err = jaxft(capsys, "teach", file, f"run_dir={cut}", "--resume", "samples=4")
    assert code == 2 and "samples was 3 and is 4" in err
    asked = []
    original = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *a, **k: asked.append(len(a[2])) or original(*a, **k))
    code, out, err = jaxft(capsys, "teach", file, f"run_dir={cut}", "--resume")
    assert code == 0 and "3 of 7 prompts are answered" in out, err
    assert sum(asked) == 5  # prompts 3 to 7 (the third with the fourth, as before)
    for name in ("samples.jsonl", "rows.jsonl"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "other", "answer": "x", "task": "t"}) + "\n")
    code, _, err = jaxft(capsys, "teach", file, f"run_dir={cut}", "--resume")
    assert code == 2 and "it answers other prompts" in err


def test_reasoning_goes_where_the_student_wants_it():
    record = {"prompt": [{"role": "user", "content": "2+2"}], "samples": [
        {"text": "<think>two twos</think>\n4", "kept": True}, {"text": "5", "kept": False}]}  # fmt: skip
    made = {}
    for where in ("content", "field", "drop"):
        settings = teach.TeachConfig(teach.AnsweringTeacher("x"), reasoning=where)
        [row] = teach.training_rows(settings, record)
        assert row["prompt"] == record["prompt"]
        made[where] = row["completion"][0]
    assert made["content"]["content"] == "<think>two twos</think>\n4" and "reasoning_content" not in made["content"]
    assert made["field"] == {"role": "assistant", "content": "4", "reasoning_content": "two twos"}
    assert made["drop"] == {"role": "assistant", "content": "4"}


def test_help_shows_its_own_keys(capsys):
    with pytest.raises(SystemExit):
        cli.main(["teach", "--help"])
    out = capsys.readouterr().out
    assert all(key in out for key in ("teacher.adapter", "verify.extract", "samples", "data.limit", "generate.batch"))
    assert "peft.rank" not in out


def test_refusals(capsys, settings, tmp_path):
    for words, said in (
        (["generate.temperature=0"], "samples that are all the same"),
        (["verify.function=no.py:f"], "no file no.py"),
        (["verify.function=soft_overlong"], "a reward that must be given max_tokens, cache"),
        ([f"verify.function={tmp_path / 'own.py'}:odd"], "has no function 'odd'"),
        (["verify.answr=x"], "did you mean `verify.answer`?"),
        (["verify.answer=solution"], "in column solution"),
        (["teacher.path=/nowhere"], "/nowhere"),
    ):
        code, _, err = jaxft(capsys, "teach", config(tmp_path, settings), f"run_dir={tmp_path / 'r'}", *words)
        assert code in (1, 2) and said in err and "Traceback" not in err, (words, err)
        assert not (tmp_path / "r").exists()
    (tmp_path / "own.py").write_text("def even(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    code, out, _ = jaxft(capsys, "teach", config(tmp_path, settings), f"run_dir={tmp_path / 'none'}")
    assert code == 1 and "No answer passed" in out and "21 function" in out.replace("\n", " ")
    assert not (tmp_path / "none" / "rows.jsonl").exists()


def test_distillation_of_sequences_as_one_command(capsys, monkeypatch, settings, tiny, tmp_path):
    """Teacher trained, its adapter merged, its answers judged, a student trained on them."""
    monkeypatch.setattr(run_, "start", lambda words: cli.main(list(words)))
    chats = [{"prompt": f"Spell {i}", "completion": f" {i}"} for i in range(4)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    defaults = {
        "model": {"path": str(tiny), "dtype": "float32"}, "train": {"steps": 2, "remat": "none"},
        "eval": {"samples": 0}, "log": {"progress": False},
    }  # fmt: skip
    answers = {**settings, "kind": "generate", "teacher": {"path": "stage:teacher", "dtype": "float32"}}
    student = {"take": "none", "data": {"path": "stage:answers", "max_length": 64}}
    file = pipeline(
        tmp_path, defaults, teacher={"data": {"path": str(tmp_path / "chats.jsonl"), "max_length": 64}},
        answers=answers, student=student,
    )  # fmt: skip
    code, out, err = jaxft(capsys, "run", file)
    assert code == 0, err
    folder = tmp_path / "p"
    assert (folder / "01-teacher" / "merged" / "config.json").exists()
    said = yaml.safe_load((folder / "03-student" / "config.yaml").read_text())
    assert said["data"]["path"] == str(folder / "02-answers" / "rows.jsonl") and said["model"]["path"] == str(tiny)
    rows = written(folder / "02-answers", "rows.jsonl")
    assert "02-answers" in out and f" {len(rows)} " in out and (folder / "03-student" / "adapter").is_dir()
    code, _, err = jaxft(capsys, "run", file, "stages.answers.samples=2")
    assert code == 2 and "stage answers is complete" in err and "samples was 3 and is 2" in err
    assert jaxft(capsys, "run", file)[0] == 0


def test_a_reward_judges_by_its_name():
    prompt, texts = [{"role": "user", "content": "1 + 1"}], ["so \\boxed{2}", "3", "<think>2</think>2.0"]
    samples = [Sample(text, 1, True) for text in texts]
    verdicts = verify.judged(VerifyConfig(function="math"), prompt, samples, {"answer": "2"}, teach._judge("math"))
    assert [(verdict.score, verdict.failed) for verdict in verdicts] == [(1, ""), (0, "function"), (1, "")]
