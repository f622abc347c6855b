"""A mixture from the command line: trained, resumed, evaluated and shown, with what is said of each source."""

import json
import shutil

import pytest

from jaxft import cli, config
from jaxft.cli import eval as eval_
from jaxft.cli import target

CONFIG = """\
data:
  max_length: 64
  template: tokenizer
  sources:
    chat: {{path: {0}/chat.jsonl, weight: 3, eval_path: {0}/chat.jsonl}}
    sums:
      path: {0}/sums.jsonl
      eval_fraction: 0.25
      prompts: ["{{a}} and {{b}}? ||| {{c}}", "{{{{ a }}}} + {{{{ b }}}} = ||| {{{{ a + b }}}}"]
    logs: {{path: {0}/logs.jsonl, task: 0}}
train: {{batch: 8, steps: 4}}
optim: {{lr: 0.01}}
eval: {{exact_match: 2, samples: 0, metric: source/sums/nll}}
checkpoint: {{every: 2}}
generate: {{max_new_tokens: 4}}
log: {{every: 1}}
"""


def jaxft(capsys, *words):
    """(exit code, stdout, stderr) of one command."""
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.fixture
def file(tmp_path):
    """A config of three sources: chats, sums told by two prompt templates, and plain text."""
    chats = [[{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}"}] for i in range(6)]
    for name, rows in (
        ("chat", [{"messages": chat} for chat in chats]),
        ("sums", [{"a": i, "b": 1, "c": i + 1} for i in range(8)]),
        ("logs", [{"text": f"the wind blew {i} times"} for i in range(5)]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mix.yaml").write_text(CONFIG.format(tmp_path))
    return tmp_path / "mix.yaml"


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_train_resume_eval(capsys, file, tiny, tmp_path):
    words = ["train", file, f"model.path={tiny}", "model.dtype=float32"]
    code, out, err = jaxft(capsys, *words, f"run_dir={tmp_path / 'whole'}")
    assert code == 0, err
    assert "3 sources, " in out and "sums/perplexity" in out and "chat: 6 examples of 6 rows read" in out
    whole = lines(tmp_path / "whole")
    steps = [line for line in whole if "loss" in line]
    assert steps[-1]["num_tokens"] == sum(steps[-1][f"source/{name}/num_tokens"] for name in ("chat", "sums", "logs"))
    assert steps[-1]["source/chat/num_tokens"] > 0 and all("source/chat/nll" in line for line in steps)
    last = [line for line in whole if "eval_loss" in line][-1]
    assert {"eval_source/chat/nll", "eval_source/sums/perplexity", "eval_source/sums/exact_match"} <= last.keys()
    assert not [name for name in last if "logs" in name]  # it has no held-out rows

    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "4")  # as if it had been killed
    code, _, err = jaxft(capsys, "train", tmp_path / "whole" / "config.yaml", "--resume")
    assert code == 0, err
    again = [line for line in lines(tmp_path / "whole") if line["step"] > 2]
    for before, after in zip([line for line in whole if line["step"] > 2], again, strict=True):
        timed = {name for name in before | after if "per_second" in name or name == "mfu"}
        assert {n: v for n, v in before.items() if n not in timed} == {n: v for n, v in after.items() if n not in timed}
    code, out, err = jaxft(capsys, "eval", tmp_path / "whole", "--json", "--limit", 0)
    assert code == 0, err
    found = json.loads(out)
    assert found["source/sums/nll"] == pytest.approx(last["eval_source/sums/nll"], rel=1e-4)
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)
    other = target.find(str(tmp_path / "whole"), eval_._other_data([f"data.path={tmp_path / 'logs.jsonl'}"]))
    assert not other.config.data.sources and other.config.data.path == str(tmp_path / "logs.jsonl")


def test_what_data_shows(capsys, file, tiny):
    """Rows with the source that each is of, the table, and what was read of each source."""
    code, out, err = jaxft(capsys, "data", file, f"model.path={tiny}", "--rows", 8)
    assert code == 0, err
    assert "(chat)" in out and "(sums)" in out and "(logs)" in out
    table = [line.split() for line in out.splitlines() if line.startswith(("chat ", "sums ", "logs "))]
    assert [(row[0], row[1], row[4]) for row in table[:3]] == [
        ("chat", "6", "60.0%"), ("sums", "6", "20.0%"), ("logs", "5", "20.0%"),
    ]  # fmt: skip
    assert "logs: 5 examples of 5 rows read" in out and "held-out data" in out


def test_the_config_is_written_and_read_again(file, tiny, tmp_path):
    """Steps of a schedule are numbers, keys of a source are set from the command line, and wrong ones are named."""
    schedule = "data.mix.schedule={0: {chat: 1, sums: 0, logs: 1}, 100: {chat: 1, sums: 2, logs: 0}}"
    words = [f"model.path={tiny}", schedule, "data.sources.chat.weight=null", "data.sources.sums.limit=3"]
    made = config.load(file, words)
    assert made.data.mix.schedule[100] == {"chat": 1, "sums": 2, "logs": 0} and made.data.sources["sums"].limit == 3
    (tmp_path / "again.yaml").write_text(config.dump(made))
    assert config.load(tmp_path / "again.yaml", [f"run_dir={made.run_dir}"]) == made
    for word, said in (
        (
            "data.sources.sums.wieght=3",
            "`data.sources.sums.wieght` is no key; did you mean `data.sources.sums.weight`?",
        ),
        ("data.sources.sums.weight=much", "`data.sources.sums.weight`: expected a number or null"),
        ("data.mix.rule=even", "expected one of weights, proportional, temperature, capped"),
        ("data.sources={a: {weight: 1}}", "`data.sources.a.path` must be given"),
    ):
        with pytest.raises(config.check.ConfigError) as caught:
            config.load(file, [f"model.path={tiny}", word])
        assert said in str(caught.value)
