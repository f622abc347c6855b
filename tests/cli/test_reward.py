"""Reward models from the command line: what is trained is scored by transformers and peft as by `jaxft eval`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.commands import jaxft

PAIRS = [
    ("Sort: 3 1 2", "1 2 3", "3 2 1"),
    ("Spell dog", "d o g", "dog"),
    ("Say hi", "hi", "no"),
    ("2 and 3", "5", "4 6 8"),
]
STEPS = [("Sort: 3 1 2", ["1", "2", "3"], [True] * 3), ("Spell dog", ["d", "g", "o"], [True, False, False])]


REWARD = ("objective.name=reward", "objective.head=zeros")


def turn(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Pairs and steps, as messages."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [
        {"prompt": turn("user", q), "chosen": turn("assistant", a), "rejected": turn("assistant", b)}
        for q, a, b in PAIRS
    ]
    steps = [{"prompt": turn("user", q), "completions": c, "labels": right} for q, c, right in STEPS]
    for name, found in (("pairs", pairs), ("steps", steps)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def train(model, data, run, *words):
    return [
        "train", f"model.path={model}", "model.dtype=float32", f"data.path={data}", f"data.eval_path={data}",
        "data.max_length=64", "train.batch=8", "optim.lr=0.01", "train.steps=3", "train.remat=none", f"run_dir={run}",
        *words,
    ]  # fmt: skip


def scored(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """What `transformers` says of a batch, padded on the right."""
    import torch

    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits[:, 0].numpy()


def test_pairs_to_a_model_that_transformers_and_peft_score_alike(capsys, tiny, rows, tmp_path):
    import peft
    from transformers import AutoModelForSequenceClassification as Auto
    from transformers import AutoTokenizer

    run, pairs = tmp_path / "run", rows / "pairs.jsonl"
    code, out, err = jaxft(capsys, *train(tiny, pairs, run, *REWARD, "eval.at_start=true"))
    assert code == 0, err
    assert "calibration error" in out and "jaxft chat" not in out and "accuracy and calibration on" in out
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = (row for row in found if "eval_loss" in row)
    assert before["eval_loss"] == pytest.approx(np.log(2), rel=1e-6)  # a head of zeros
    assert after["eval_loss"] < 0.6 and not (run / "samples.jsonl").exists()

    code, out, err = jaxft(capsys, "eval", run, f"data.path={pairs}", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["loss"] == pytest.approx(after["eval_loss"], rel=1e-5)
    assert sum(row["share"] for row in said["reliability"]) == pytest.approx(1.0)

    code, out, err = jaxft(capsys, "merge", run, "--out", tmp_path / "merged")
    assert code == 0 and "AutoModelForSequenceClassification" in out, err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    show = lambda *turns: tokenizer.apply_chat_template([t[0] for t in turns], tokenize=False)  # noqa: E731
    texts = [show(turn("user", q), turn("assistant", a)) for q, *both in PAIRS for a in both]
    rewards = scored(Auto.from_pretrained(tmp_path / "merged"), tokenizer, texts)
    assert said["margin"] == pytest.approx(np.mean(rewards[::2] - rewards[1::2]), rel=1e-4)
    assert said["min_reward"] == pytest.approx(rewards.min(), rel=1e-4)
    base = Auto.from_pretrained(tiny, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter")
    np.testing.assert_allclose(scored(adapted, tokenizer, texts), rewards, rtol=1e-4, atol=1e-5)

    steps = rows / "steps.jsonl"  # a reward model goes on as another, whole
    words = train(tmp_path / "merged", steps, tmp_path / "prm", "objective.name=prm", "peft.method=full")
    code, out, err = jaxft(capsys, *words)
    assert code == 0, err
    again = Auto.from_pretrained(tmp_path / "prm" / "model")
    opening = tokenizer.apply_chat_template(turn("user", "Spell dog"), tokenize=False, add_generation_prompt=True)
    ends = scored(again, tokenizer, [opening + "".join(f"{s}\n" for s in "dgo"[:n]) for n in (1, 2, 3)])
    more = [opening.replace("Spell dog", "Sort: 3 1 2") + "".join(f"{n}\n" for n in range(1, m)) for m in (2, 3, 4)]
    every, right = np.append(ends, scored(again, tokenizer, more)), np.array([1, 0, 0, 1, 1, 1], bool)
    code, out, err = jaxft(capsys, "eval", tmp_path / "prm", f"data.path={steps}", "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] == pytest.approx(np.mean(np.logaddexp(0, np.where(right, -every, every))), rel=1e-4)

    data = f"data.path={pairs}"
    for words, want in (
        (("chat", run), "a model that scores sequences; expected a language model"),
        (("eval", tmp_path / "merged", data), "objective.name=reward"),
        (train(tmp_path / "merged", pairs, tmp_path / "x", "objective.name=dpo"), "dpo trains a language model"),
    ):
        code, _, err = jaxft(capsys, *words)
        assert code and want in err, err


def test_what_cannot_be_a_reward_model_is_refused(capsys, tiny, rows, tmp_path):
    """Before anything is trained; each error says the way out."""
    plain = tmp_path / "plain"
    shutil.copytree(tiny, plain)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"prompt": q, "chosen": f" {a}", "rejected": f" {b}"}) + "\n" for q, a, b in PAIRS)
    )
    reward = "objective.name=reward"
    cases = [
        (train(plain, rows / "pairs.jsonl", tmp_path / "x", reward), "no padding token"),
        (
            train(tiny, texts, tmp_path / "x", reward, "model.pad_token=<|im_end|>"),
            "8 of 8 sequences end in the padding",
        ),
        (train(tiny, texts, tmp_path / "x", reward, "model.pad_token=<|other|>"), "expected a token of the vocabulary"),
        (train(tiny, rows / "pairs.jsonl", tmp_path / "x", reward, "eval.exact_match=2"), "answers nothing"),
        (train(tiny, rows / "pairs.jsonl", tmp_path / "x", "objective.name=prm"), "stepwise"),
    ]
    for words, want in cases:
        code, _, err = jaxft(capsys, *words)
        assert code and want in err, err
        assert not (tmp_path / "x").exists()
