"""A general set beside the task's, and what holds a run to its start, from the command line."""

import json

import numpy as np
import pytest

from tests.cli.commands import jaxft, metrics

TASK = [("Sort: 3 1 2", "1 2 3"), ("Spell dog", "d o g"), ("Say hi", "hi"), ("Add 2 and 3", "5")]
OLD = ["Dear Vera,\nhow are you. Please bring your coin.", "After school Vera lost her blanket.", "I will bring plums."]


@pytest.fixture
def words(tiny, tmp_path):
    """A short run on chats, with an old set of plain texts."""
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TASK]
    pairs = [{"prompt": q, "chosen": a, "rejected": a[::-1] + "?"} for q, a in TASK]
    rows = {"task": chats, "pairs": pairs, "old": [{"text": text} for text in OLD], "kept": [{"text": OLD[0][9:]}] * 3}
    for name, several in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    return [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'task.jsonl'}", "peft.rank=4",
        f"data.eval_path={tmp_path / 'task.jsonl'}", f"eval.general={tmp_path / 'old.jsonl'}", "data.max_length=64",
        "train.batch=8", "train.steps=4", "optim.lr=0.01", "eval.samples=0", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def perplexity(folder, texts):
    """By transformers: of all tokens of each document but its first, its end of text included."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total = count = 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return np.exp(total / count)


def test_everything_that_holds_a_run_and_what_it_forgot(capsys, words, tiny, tmp_path):
    """The general set is measured as transformers and `jaxft eval` measure it."""
    holds = [
        "optim.l2_start=0.5", "optim.ewc=2", f"optim.ewc_data={tmp_path / 'kept.jsonl'}", "objective.kl_to_start=0.3",
        "eval.every=4",
    ]  # fmt: skip
    code, out, err = jaxft(capsys, *words, *holds)
    assert code == 0, err
    assert "general perplexity" in out and "change" in out
    lines = metrics(tmp_path / "run")
    evaluations = [line for line in lines if "eval_general_nll" in line]
    assert [line["step"] for line in evaluations] == [0, 4]
    assert evaluations[0]["eval_general_perplexity"] == pytest.approx(perplexity(tiny, OLD), rel=1e-4)
    steps = [line for line in lines if "loss" in line]
    for name in ("penalty/l2_start", "penalty/ewc", "kl_to_start"):
        values = [line[name] for line in steps]
        assert values[0] == pytest.approx(0, abs=1e-6) and min(values[1:]) > 1e-6, name

    code, out, err = jaxft(capsys, "eval", tmp_path / "run", "--json", "--limit", "0")
    assert code == 0, err
    told = json.loads(out)
    for name in ("general_nll", "nll", "kl_to_start"):
        assert told[name] == pytest.approx(evaluations[-1][f"eval_{name}"], abs=2e-5), name


@pytest.mark.parametrize("key", ["eval.general", "optim.ewc_data"])
def test_texts_that_are_not_there_are_named_by_their_own_key(capsys, words, key):
    code, _, err = jaxft(
        capsys, *words, "optim.ewc=1", words[3].replace("data.path", "optim.ewc_data"), f"{key}=nowhere.jsonl"
    )
    assert code == 1 and f"nowhere.jsonl: `{key}`: got nothing there" in err


def test_any_objective_and_a_sweep(capsys, words, tmp_path):
    """Preferences; members of a sweep; a run that has nothing else to evaluate, which must say what is best."""
    pairs = f"data.path={tmp_path / 'pairs.jsonl'}"
    code, _, err = jaxft(capsys, *words, pairs, f"data.eval_path={tmp_path / 'pairs.jsonl'}", "objective=dpo")
    assert code == 0, err
    last = metrics(tmp_path / "run")[-1]
    assert {"eval_rewards/accuracies", "eval_general_nll", "eval_general_perplexity"} <= last.keys()

    members = ["optim.l2_start=0.5", "--sweep", "optim.lr=1e-2,1e-3", "train.seed=0,1"]
    alone = [*words, f"run_dir={tmp_path / 'sweep'}", "data.eval_path=null"]
    code, _, err = jaxft(capsys, *alone, *members)
    assert code == 2 and "`eval.metric`: got 'loss'; this run evaluates general_nll, general_perplexity" in err
    code, out, err = jaxft(capsys, *alone, "eval.metric=general_nll", "train.steps=2", *members)
    assert code == 0, err
    ended = [metrics(folder)[-1]["eval_general_nll"] for folder in (tmp_path / "sweep" / "members").iterdir()]
    assert len(set(ended)) == 4 and "general nll" in out
    for key in ("objective.kl_to_start=0.1", "optim.ewc=1"):
        more = [key, *([f"optim.ewc_data={tmp_path / 'kept.jsonl'}"] if "ewc" in key else [])]
        code, _, err = jaxft(capsys, *alone, *more, *members)
        assert code == 2 and key.partition("=")[0] in err and "one by one" in err
    code, _, err = jaxft(capsys, *alone, "objective.kl_to_start=0.1", "objective.kl_sources=[0]")
    assert code == 2 and "`objective.kl_sources`: got [0]" in err and "there are no data.sources" in err
