"""Runs that read another model beside the one they train: references and teachers, live and found beforehand."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft import cli

PAIRS = [("Sort: 3 1 2", "1 2 3", "3 2 1"), ("Spell dog", "d o g", "dog dog"), ("Say hi", "hi", "no"),
         ("Add 2 and 3", "5", "I do not know")]  # fmt: skip
NUMBERS = ("loss", "grad_norm", "rewards/chosen", "rewards/margins")


def jaxft(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def rows(folder, prefix=""):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if f"{prefix}loss" in row]


@pytest.fixture
def words(tiny, tmp_path):
    """A short run on four pairs, and the same four held out."""

    def chat(role, text):
        return [{"role": role, "content": text}]

    made = [
        {"prompt": chat("user", q), "chosen": chat("assistant", good), "rejected": chat("assistant", bad)}
        for q, good, bad in PAIRS
    ]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'train.jsonl'}",
        f"data.eval_path={tmp_path / 'held_out.jsonl'}", "data.max_length=64", "train.batch=8", "train.steps=3",
        "optim.lr=0.01", "optim.warmup_steps=0", "eval.samples=0", "objective.name=dpo",
    ]  # fmt: skip


def equal(one, other, names=NUMBERS, rtol=2e-4):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose([a[n] for n in names], [b[n] for n in names], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("peft", [["peft.method=lora"], ["peft.method=prompt_tuning", "peft.tokens=3"]])
def test_every_way_to_the_same_reference(capsys, words, tiny, tmp_path, peft):
    """A prompt is not the identity at its start, so the model without it is another reference there."""
    ways = {"live": [], "known": ["reference.precompute=true"]}
    if "lora" in peft[0]:
        other = [f"reference.path={tiny}"]
        ways = {"live": [], "other": other, "known": [*other, "reference.precompute=true"]}
    for name, more in ways.items():
        jaxft(capsys, *words, *peft, *more, f"run_dir={tmp_path / name}")
    first = rows(tmp_path / "live")
    assert first[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and first[-1]["loss"] < 0.69
    for name in ways:
        equal(rows(tmp_path / name), first)
        equal(rows(tmp_path / name, "eval_"), rows(tmp_path / "live", "eval_"), ["eval_loss", "eval_rewards/margins"])
        assert (tmp_path / name / "reference" / "train.npy").exists() == ("known" in name)
    if "lora" in peft[0]:
        said = json.loads(jaxft(capsys, "eval", tmp_path / "known", "--json", "--limit", "0"))
        last = rows(tmp_path / "known", "eval_")[-1]
        assert said["rewards/margins"] == pytest.approx(last["eval_rewards/margins"], rel=1e-3)


@pytest.mark.parametrize(
    "peft",
    [
        ["peft.method=full"],
        ["peft.method=prompt_tuning", "peft.tokens=3"],
        ["peft.method=adapter", "peft.frozen=false"],
    ],
)
def test_a_run_is_evaluated_against_what_it_began_with(capsys, words, tmp_path, peft):
    """Though what it made is another model, a prompt that was never the identity, or an adapter trained further."""
    if "adapter" in peft[0]:
        jaxft(capsys, *words, "peft.method=lora", f"run_dir={tmp_path / 'first'}")
        peft = [*peft, f"peft.path={tmp_path / 'first' / 'adapter'}"]
    jaxft(capsys, *words, *peft, f"run_dir={tmp_path / 'run'}")
    last = rows(tmp_path / "run", "eval_")[-1]
    said = json.loads(jaxft(capsys, "eval", tmp_path / "run", "--json", "--limit", "0"))
    assert last["eval_loss"] < 0.69
    for name in ("loss", "rewards/margins", "rewards/chosen"):
        assert said[name] == pytest.approx(last[f"eval_{name}"], rel=1e-3, abs=1e-4)


def test_what_is_known_is_shared_and_refused_for_anything_else(capsys, words, tmp_path):
    stored = [f"reference.stored={tmp_path / 'shared'}", "reference.precompute=true"]
    assert "log-probabilities of 8 sequences" in jaxft(capsys, *words, *stored, f"run_dir={tmp_path / 'a'}")
    again = jaxft(capsys, *words, *stored, "optim.lr=0.02", "objective.beta=0.2", f"run_dir={tmp_path / 'b'}")
    assert "log-probabilities" not in again
    code = cli.main([*words, *stored, "data.limit=3", f"run_dir={tmp_path / 'c'}"])
    assert code != 0 and "It was made of other data" in capsys.readouterr().err


def test_a_run_goes_on_with_its_reference_and_running_means(capsys, words, tmp_path):
    more = ["objective.name=bco", "train.steps=4", "optim.schedule=constant", "checkpoint.every=2"]
    jaxft(capsys, *words, *more, f"run_dir={tmp_path / 'whole'}")
    jaxft(capsys, *words, *more, f"run_dir={tmp_path / 'cut'}")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    jaxft(capsys, *words, *more, f"run_dir={tmp_path / 'cut'}", "--resume")
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut")]
    for name, value in adapters[0].items():
        np.testing.assert_array_equal(adapters[1][name], value)
    whole, cut = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    assert [row["delta"] for row in cut] == [row["delta"] for row in whole]


@pytest.fixture(scope="session")
def larger(tiny, tmp_path_factory):
    """A teacher of another shape with the same tokenizer."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=transformers.AutoConfig.from_pretrained(tiny).vocab_size, hidden_size=128, intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("models") / "larger"
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def taught(words, tmp_path):
    """The chosen completions as chats, for a student."""
    for name in ("train", "held_out"):
        lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a, _ in PAIRS]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in lines))
    return [*words[:-1], "objective.name=distil", "peft.rank=4"]


def test_a_student_learns_from_a_teacher_live_or_stored(capsys, taught, larger, tmp_path):
    teacher = [f"teacher.path={larger}"]
    jaxft(capsys, *taught, *teacher, f"run_dir={tmp_path / 'live'}")
    live = rows(tmp_path / "live")
    assert live[-1]["divergence"] < live[0]["divergence"]
    every = ["objective.teacher=stored", "teacher.top_k=2047"]
    out = jaxft(capsys, *taught, *teacher, *every, f"run_dir={tmp_path / 'stored'}")
    assert "teacher: train" in out
    equal(rows(tmp_path / "stored"), live, ["loss", "divergence"], rtol=5e-3)  # kept in float16
    alone = [f"teacher.stored={tmp_path / 'stored' / 'teacher'}", *every]
    jaxft(capsys, *taught, *alone, f"run_dir={tmp_path / 'alone'}")
    equal(rows(tmp_path / "alone"), rows(tmp_path / "stored"), ["loss"], rtol=1e-6)
    said = json.loads(jaxft(capsys, "eval", tmp_path / "live", "--json", "--limit", "0"))
    assert said["divergence"] == pytest.approx(rows(tmp_path / "live", "eval_")[-1]["eval_divergence"], rel=1e-3)


def test_hidden_states_and_a_quantised_teacher(capsys, taught, larger, tmp_path):
    more = ["objective.hidden_layers=[[0,1],[-1,-1]]", "objective.hidden_weight=0.001", "objective.divergence=jsd"]
    run = tmp_path / "run"
    jaxft(
        capsys, *taught, f"teacher.path={larger}", "teacher.quantize=nf4", *more, "train.accumulate=2", f"run_dir={run}"
    )
    found = rows(run)
    assert found[-1]["hidden"] < found[0]["hidden"] and found[0]["loss/hidden"] > 0
    assert not [name for name in load_file(run / "adapter" / "adapter_model.safetensors") if "distil" in name]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["objective.name=orpo", "reference.precompute=true"], "compares with no reference"),
        (["objective.reference_free=true", "reference.path=x"], "compares with no reference"),
        (["objective.name=kto", "reference.precompute=true"], "cannot be found beforehand"),
        (["objective.ref_sync_steps=2", "reference.precompute=true"], "moves the reference"),
        (["reference.stored=x"], "reference.precompute=true"),
        (["teacher.path=x"], "learns from no teacher"),
        (["objective.name=distil"], "`teacher.path` must be given"),
        (["objective.name=distil", "objective.teacher=stored"], "`teacher.path` or `teacher.stored`"),
        (["objective.name=distil", "teacher.path=x", "teacher.stored=y"], "a live teacher is not stored"),
        (["objective.name=distil", "teacher.path=x", "teacher.top_k=8"], "`teacher.top_k`: a live teacher"),
        (["objective.name=distil", "objective.teacher=stored", "teacher.path=x", "teacher.top_k=0"], "got 0"),
        (["objective.ref_sync_steps=2", "optim.l2_start=1"], "`optim.l2_start`: pulls to the start"),
    ],
)
def test_what_does_not_fit_the_objective_is_refused(capsys, words, tmp_path, more, said):
    assert cli.main([*words, *more, f"run_dir={tmp_path / 'run'}"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
