"""jaxft critique: replies criticised and revised by a constitution, as rows for sft, alone and as a stage."""

import json

import pytest
import yaml

from jaxft import cli
from jaxft.cli import run as run_
from jaxft.rewards.feedback import constitution
from tests.cli.commands import jaxft
from tests.cli.test_judge import written
from tests.cli.test_pipeline import pipeline
from tests.rewards.feedback.stub import Reply, said, serving
from tests.rewards.feedback.test_verdicts import replies


@pytest.fixture
def settings(tiny, tmp_path):
    """Four prompts to a random model."""
    rows = [{"prompt": [{"role": "user", "content": f"Spell {i}"}]} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "policy": {"path": str(tiny), "dtype": "float32"},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "generate": {"max_new_tokens": 6, "temperature": 1.0, "batch": 8},
    }


def start(capsys, tmp_path, settings, name, *words):
    (tmp_path / "critique.yaml").write_text(yaml.safe_dump(settings))
    code, out, err = jaxft(capsys, "critique", tmp_path / "critique.yaml", f"run_dir={tmp_path / name}", *words)
    return code, out, err, tmp_path / name


def quoted(text, name):
    return text.split(f"[{name} ")[1].split("\n", 1)[1].split(f"\n[End of {name} ")[0]


def critic(n, body):
    """Criticises by number of letters, and revises into what the critique says; some of it goes wrong."""
    text = body["messages"][0]["content"]
    if "Critique of the reply" not in text:
        return said(f"<think>hm</think>Too short: {len(quoted(text, 'Reply'))}")
    if "Spell 3" in text:
        return Reply(400, b'{"error": "no"}')
    long = "Spell 2" in text
    return said("Better than " + quoted(text, "Critique of the reply"), finish="length" if long else "stop")


def test_each_round_builds_on_the_one_before(capsys, settings, tmp_path):
    with serving(critic) as stub:
        settings |= {"judge": {"endpoint": stub.settings(), "max_new_tokens": 30, "temperature": 0.5}, "rounds": 2}
        code, out, err, folder = start(capsys, tmp_path, settings, "a")
        assert code == 0, err
        assert len(stub.seen) == 4 + 4 + 2 + 2
        assert all(seen.body["temperature"] == 0.5 and seen.body["max_tokens"] == 30 for seen in stub.seen)
        code, _, err, _ = start(capsys, tmp_path, settings, "a", "--resume")
        assert code == 0 and len(stub.seen) == 12 + 1, err  # the failure alone is asked again
    rows = written(folder, "rows.jsonl")
    assert [row["prompt"][0]["content"] for row in rows] == ["Spell 0", "Spell 1"]
    for row in rows:
        first, second = row["rounds"]
        drawn = constitution.read().chosen(row["prompt"], 0, 2)
        assert [first["principle"], second["principle"]] == [one.name for one in drawn]
        assert first["critique"] == f"Too short: {len(first['before'])}"
        assert first["revision"] == f"Better than {first['critique']}" == second["before"]
        assert second["critique"] == f"Too short: {len(second['before'])}"
        assert row["completion"] == [{"role": "assistant", "content": second["revision"]}]
    assert "HTTP 400" in out and "revision cut at judge.max_new_tokens" in out
    asked = [record for record in written(folder, "judgements.jsonl") if record.get("asks") == "critique"]
    texts = [record["chat"][0]["content"] for record in asked]
    by = {one.name: one.critique for one in constitution.read().principles}
    assert all(text.endswith(by[record["principle"]]) for text, record in zip(texts, asked, strict=True))
    report = json.loads((folder / "report.json").read_text())
    assert report == {"prompts": 4, "rows": 2, "left_out": 2}


def by_length(n, body):
    a, b = replies(body["messages"][0]["content"])
    return said("A" if len(a) > len(b) else "B")


def test_a_constitution_in_one_pipeline(capsys, monkeypatch, settings, tiny, tmp_path):
    """Critiques by the model itself, sft on the revisions, preferences over what came out, dpo on those."""
    monkeypatch.setattr(run_, "start", lambda words: cli.main(list(words)))
    long = {"name": "long", "critique": "Is it long?", "revision": "Longer!", "comparison": "Which is longer?"}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"principles": [long]}))
    defaults = {
        "model": {"path": str(tiny), "dtype": "float32"}, "train": {"steps": 1, "remat": "none", "batch": 8},
        "eval": {"samples": 0}, "log": {"progress": False}, "constitution": str(tmp_path / "long.yaml"),
    }  # fmt: skip
    with serving(by_length) as stub:
        file = pipeline(
            tmp_path, defaults,
            critique={**settings, "kind": "critique", "judge": {"max_new_tokens": 6}, "finished": False},
            sft={"take": "none", "data": {"path": "stage:critique", "max_length": 256}},
            judge={**settings, "kind": "judge", "policy": {"path": "stage:sft", "dtype": "float32"}, "samples": 2,
                   "finished": False, "judge": {"endpoint": stub.settings()}},
            dpo={"objective": {"name": "dpo"}, "data": {"path": "stage:judge", "max_length": 64}},
        )  # fmt: skip
        code, out, err = jaxft(capsys, "run", file)
        assert code == 0, err
        folder = tmp_path / "p"
        said = yaml.safe_load((folder / "03-judge" / "config.yaml").read_text())
        assert said["policy"]["path"] == str(folder / "02-sft" / "merged")
        assert {row["principle"] for row in written(folder / "03-judge", "rows.jsonl")} == {"long"}
        assert "03-judge" in out and "order decided" in out and (folder / "04-dpo" / "adapter").is_dir()
        code, _, err = jaxft(capsys, "run", file, "stages.judge.samples=3")
        assert code == 2 and "stage judge is complete" in err and "samples was 2 and is 3" in err
    code, _, err = jaxft(capsys, "run", file, "stages.judge.take=keep")
    assert code == 2 and "policy.path" in err


def test_help_shows_its_own_keys(capsys):
    for verb, key in (("critique", "rounds"), ("judge", "confidence")):
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        out = capsys.readouterr().out
        assert all(name in out for name in (key, "policy.path", "judge.endpoint.key_env", "constitution"))
        assert "peft.rank" not in out
