"""jaxft train --sweep: many runs at once, each of them what it would be alone, and a run like any other afterwards."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from jaxft import cli, config
from jaxft.cli import members
from tests.cli.test_train import CHATS, jaxft, metrics, torch_logits

SWEEP = ("peft.rank=2,4", "optim.lr=0.01,3e-3", "seed=0..1")
ALONE = {"rank=2,lr=0.003,seed=1": ("peft.rank=2", "optim.lr=3e-3", "train.seed=1"),
         "rank=4,lr=0.01,seed=0": ("peft.rank=4", "optim.lr=0.01", "train.seed=0")}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    """What all runs have in common; more rows than a batch, so that the order of the data matters."""
    data = tmp_path_factory.mktemp("data")
    chats = [(f"{question} {i}", f"{answer} {i}") for i in range(4) for question, answer in CHATS]
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    for name in ("train", "held_out"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in lines))
    return [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={data / 'train.jsonl'}",
        f"data.eval_path={data / 'held_out.jsonl'}", "data.max_length=64", "train.batch=8", "train.steps=4",
        "optim.schedule=constant", "eval.samples=2", "eval.exact_match=1", "generate.max_new_tokens=8",
        "eval.every=4", "log.progress=false", "data.packing=none",
    ]  # fmt: skip


def quiet(*words):
    assert cli.main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    """A sweep of eight LoRAs with dropout."""
    run = tmp_path_factory.mktemp("runs") / "sweep"
    quiet(*settings, "peft.dropout=0.2", f"run_dir={run}", "--sweep", *SWEEP)
    return run


@pytest.mark.parametrize("name", ALONE)
def test_every_curve_is_that_of_the_run_alone(settings, swept, tmp_path, name):
    quiet(*settings, "peft.dropout=0.2", f"run_dir={tmp_path / 'run'}", *ALONE[name])
    want, got = metrics(tmp_path / "run"), metrics(swept / "members" / name)
    assert len([row for row in want if "loss" in row]) == 4 and any("eval_loss" in row for row in want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() <= theirs.keys() and mine["step"] == theirs["step"]
        for key, value in mine.items():
            assert value == pytest.approx(theirs[key], rel=1e-4, abs=1e-7), key
    samples = [(path / "samples.jsonl").read_text() for path in (swept / "members" / name, tmp_path / "run")]
    assert samples[0] == samples[1]
    both = [torch_logits_of(settings, folder / "adapter") for folder in (swept / "members" / name, tmp_path / "run")]
    assert abs(both[0] - both[1]).max() < 1e-3 and abs(both[0] - torch_logits_of(settings, None)).max() > 1e-2


def torch_logits_of(settings, adapter):
    return torch_logits(settings[1].removeprefix("model.path="), adapter)


def test_a_member_is_a_run_like_any_other(swept, capsys):
    name = "rank=2,lr=0.003,seed=1"
    folder = swept / "members" / name
    assert config.load(folder / "config.yaml").peft[0].value.rank == 2
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    code, out, err = jaxft(capsys, "eval", folder, "--json", "--limit", "0")
    assert code == 0, err
    last = [row for row in metrics(folder) if "eval_loss" in row][-1]
    assert json.loads(out)["loss"] == pytest.approx(last["eval_loss"], abs=1e-5)
    for verb in ("eval", "inspect"):
        code, _, err = jaxft(capsys, verb, swept)
        assert code == 2 and "a sweep of several runs; say which" in err and str(folder) in err


def test_ranking_and_drawing(settings, tmp_path, capsys):
    run = tmp_path / "run"
    code, out, err = jaxft(
        capsys, *settings, "eval.metric=perplexity", f"run_dir={run}", "--sweep", "optim.lr=1e-5,0.02", "peft.alpha=4"
    )
    assert code == 0, err
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [["1", "0.02", "4"], ["2", "1e-05", "4"]]
    names = [f"lr={lr},alpha=4" for lr in ("1e-05", "0.02")]
    reached = [metrics(run / "members" / name)[-1]["eval_perplexity"] for name in names]
    assert reached[1] < reached[0] and metrics(run)[-1]["eval_perplexity"] == reached[1]
    assert f"jaxft chat {run / 'members' / names[1]}" in out.replace("\n", "")
    drawing = ET.parse(run / "sweep.svg").getroot()
    lines = drawing.findall(".//{*}polyline")
    assert [line.find("{*}title").text for line in lines] == names * 2  # training and held out
    assert len(lines[0].get("points").split()) == 4


def test_a_member_that_failed_is_told(settings, tmp_path, capsys):
    """Beside one that did not, of another size and with the method's own learning rate."""
    plain = [word for word in settings if not word.startswith(("data.eval_path", "eval."))]
    run = ["train.steps=3", "optim.warmup_steps=0", "optim.clip_norm=null", f"run_dir={tmp_path / 'run'}"]
    sweep = ["--sweep", "optim.lr=1e30,null", "--sweep", "peft.rank=1,2", "--sweep", "peft.alpha=null"]
    code, out, err = jaxft(capsys, *plain, *run, *sweep)
    assert code == 1 and "Next:" in out, out + err
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["1", "2", "failed", "failed"] and {row[1] for row in rows[:2]} == {"null"}
    assert "Failed, their loss not finite" in out and "lr=null" in out.split("Next:")[1] and rows[0][3] == "null"
    sizes = re.search(r"4 members of ([\d,]+) to ([\d,]+) parameters side", out)
    assert sizes and 2 * int(sizes[1].replace(",", "")) == int(sizes[2].replace(",", ""))


def test_resume_goes_on_where_it_stood(settings, tmp_path):
    """With an order of the data for each member; what was written after the last checkpoint is written again."""
    sweep = ["--sweep", "peft.rank=2,3", "seed,data.seed=1..2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    plain = [word for word in settings if not word.startswith(("data.eval_path", "eval."))]
    quiet(*plain, f"run_dir={whole}", *sweep)
    quiet(*plain, "train.steps=2", f"run_dir={cut}", *sweep)
    for folder in (cut / "members").iterdir():
        lines = (folder / "metrics.jsonl").read_text() + json.dumps({"step": 3, "loss": 9.0, "skipped": 1}) + "\n"
        (folder / "metrics.jsonl").write_text(lines)
    quiet("train", cut / "config.yaml", "train.steps=4", "--resume")
    names = sorted(folder.name for folder in (whole / "members").iterdir())
    assert names[0] == "rank=2,train.seed=1,data.seed=1" and len(names) == 4
    for name in names:
        want, got = ([r for r in metrics(run / "members" / name) if "loss" in r] for run in (whole, cut))
        assert got == want
    first = [metrics(whole / "members" / name)[0]["loss"] for name in names]
    assert first[0] != pytest.approx(first[1], rel=1e-3)  # other rows


def test_whole_models(settings, tmp_path):
    quiet(
        *settings,
        "peft.method=full",
        "peft.select=norms",
        "eval.samples=0",
        "eval.exact_match=0",
        f"run_dir={tmp_path}/run",
        "--sweep",
        "optim.lr=0.1,0.01",
    )
    a, b = (torch_logits(tmp_path / "run" / "members" / f"lr={lr}" / "model") for lr in (0.1, 0.01))
    assert abs(a - b).max() > 1e-2


def test_dry_run_lists_the_members(capsys):
    code, out, err = jaxft(capsys, "train", "model.path=x", "--dry-run", "--sweep", *SWEEP)
    assert code == 0, err
    listed = [line.split(": ")[1] for line in out.splitlines() if line.startswith("# member")]
    assert len(listed) == 8 and listed[1] == "rank=2,lr=0.01,seed=1" and set(ALONE) <= set(listed)
    found = members.expand(config.load(None, ["model.path=x", "run_dir=r", f"sweep={json.dumps(SWEEP)}"]))
    assert [member.name for member in found] == listed
    last = found[-1].config
    assert (last.peft[0].value.rank, last.optim.lr, last.train.seed, last.sweep) == (4, 3e-3, 1, ())
    assert last.run_dir == "r/members/rank=4,lr=0.003,seed=1"


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["peft.targets=q_proj,v_proj"], "peft.targets cannot differ between members; a sweep can vary optim.lr"),
        (["peft.dropout=0,0.1"], "peft.dropout cannot differ"),
        (["train.steps=1,2"], "train.steps cannot differ"),
        (["data.path=a,b"], "data.path cannot differ"),
        (["peft.rnk=1,2"], "did you mean `peft.rank`?"),
        (["peft.rslora=true,false"], "another program than"),
        (["optim.lr=a,b"], "expected a number"),
        (["optim.lr=1", "optim.lr=2"], "more than once"),
        (["seed=0,0"], "two members are seed=0"),
        (["seed=3..1"], "expected values, or first..last"),
        (["seed"], "expected key=value"),
    ],
)
def test_refusals(settings, tmp_path, capsys, items, said):
    code, _, err = jaxft(capsys, *settings, f"run_dir={tmp_path / 'run'}", "--sweep", *items)
    assert code == 2 and said in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()
