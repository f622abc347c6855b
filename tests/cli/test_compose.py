"""Lists of methods, new tokens, and adapters on earlier ones, from the command line to files that stand alone."""

import json
import shutil

import pytest
import transformers
from safetensors.numpy import load_file

from tests.cli.test_train import jaxft, metrics, torch_logits, words  # noqa: F401

SHORT = ("eval.samples=0", "train.steps=2")
TENSORS = "adapter_model.safetensors"


def kind(folder) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def evaluated(capsys, target, *extra) -> float:
    code, out, err = jaxft(capsys, "eval", target, "--json", "--limit", "0", *extra)
    assert code == 0, err
    return json.loads(out)["loss"]


def last_loss(run) -> float:
    return [row for row in metrics(run) if "eval_loss" in row][-1]["eval_loss"]


def test_lora_tokens_and_norms_with_a_new_token(capsys, words, tmp_path):  # noqa: F811
    """One adapter for peft; the run, the adapter alone and the merged model all know the token."""
    run = tmp_path / "run"
    methods = "peft=[{method: lora, rank: 2}, {method: trainable_tokens, head: true}, {method: norms}]"
    code, out, err = jaxft(capsys, *words, *SHORT, methods, "peft.0.rank=3", "model.new_tokens=[<tool>]")
    assert code == 0, err
    assert "lora + trainable_tokens + norms" in " ".join(out.split()) and kind(run / "adapter") == "LORA"
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3 and set(config["trainable_token_indices"]) == {"embed_tokens", "lm_head"}
    assert evaluated(capsys, run) == pytest.approx(last_loss(run), abs=1e-5)
    data = [word for word in words if word.startswith(("data.", "train.batch", "model.dtype"))]
    data = [w if not w.startswith("data.path") else f"data.path={tmp_path / 'held_out.jsonl'}" for w in data]
    data = [w for w in data if not w.startswith("data.eval_path")]
    assert evaluated(capsys, run / "adapter", *data) == pytest.approx(last_loss(run), abs=1e-5)
    for target in (run, run / "adapter"):
        code, out, err = jaxft(capsys, "generate", target, "--prompt", "a<tool>", "generate.max_new_tokens=2")
        assert code == 0, err
    code, _, err = jaxft(capsys, "merge", run, "--out", tmp_path / "merged")
    assert code == 0, err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    size = transformers.AutoConfig.from_pretrained(tmp_path / "merged").vocab_size
    assert tokenizer.convert_tokens_to_ids("<tool>") == size - 1
    code, out, err = jaxft(capsys, "data", *[word for word in words[1:] if "=" in word], "model.new_tokens=[<tool>]")
    assert code == 0, err


@pytest.mark.parametrize("method", ["bitfit", "last_layers"])
def test_what_peft_cannot_hold(capsys, words, tmp_path, method):  # noqa: F811
    run = tmp_path / "run"
    extra = ["peft.n=1"] if method == "last_layers" else ["peft.exclude=[down_proj]", "peft.layers=[1]"]
    code, _, err = jaxft(capsys, *words, *SHORT, f"peft.method={method}", *extra)
    assert code == 0, err
    assert kind(run / "adapter") == ("JAXFT" if method == "last_layers" else "BEFT")
    assert evaluated(capsys, run) == pytest.approx(last_loss(run), abs=1e-5)
    code, _, err = jaxft(capsys, "export", run, "--adapter", "--out", tmp_path / "exported")
    assert code == 0, err
    ours, again = (load_file(folder / TENSORS) for folder in (run / "adapter", tmp_path / "exported"))
    assert ours.keys() == again.keys() and all((ours[name] == again[name]).all() for name in ours)
    code, _, err = jaxft(capsys, "merge", run, "--out", tmp_path / "merged")
    assert code == 0, err
    assert abs(torch_logits(tmp_path / "merged")).max() > 0


def test_adapters_on_an_earlier_one(capsys, words, tmp_path):  # noqa: F811
    """Frozen it does not move and is saved with what is new; else it trains on and is saved as what it was."""
    first = tmp_path / "first"
    code, _, err = jaxft(capsys, *words, *SHORT, "peft.rank=2", f"run_dir={first}")
    assert code == 0, err
    before = {name: array.copy() for name, array in load_file(first / "adapter" / TENSORS).items()}

    on = f"peft=[{{method: adapter, path: {first / 'adapter'}}}, {{method: lora, rank: 4}}]"
    code, _, err = jaxft(capsys, *words, *SHORT, on, f"run_dir={tmp_path / 'on'}", "eval.at_start=true")
    assert code == 0, err
    start = next(row for row in metrics(tmp_path / "on") if "eval_loss" in row)
    assert start["step"] == 0 and start["eval_loss"] == pytest.approx(last_loss(first), abs=1e-5)
    held = load_file(tmp_path / "on" / "adapter" / TENSORS)
    assert kind(tmp_path / "on" / "adapter") == "JAXFT"
    old = before["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].T
    assert (held["layers/attn/q/base/b"][1] == old).all() and abs(held["layers/attn/q/b"]).max() > 0

    more = [f"peft={{method: adapter, path: {first / 'adapter'}, frozen: false}}", f"run_dir={tmp_path / 'more'}"]
    code, _, err = jaxft(capsys, *words, *SHORT, *more)
    assert code == 0, err
    after = load_file(tmp_path / "more" / "adapter" / TENSORS)
    assert after.keys() == before.keys() and any((after[name] != before[name]).any() for name in after)

    shutil.rmtree(first)
    for name in ("on", "more"):
        assert evaluated(capsys, tmp_path / name) == pytest.approx(last_loss(tmp_path / name), abs=1e-5)


def test_only_frozen_adapters_are_refused(capsys, words, adapter, tmp_path):  # noqa: F811
    code, _, err = jaxft(capsys, *words, f"peft={{method: adapter, path: {adapter}}}")
    assert code == 1 and "nothing to train" in err
    code, _, err = jaxft(capsys, *words, "peft={method: adapter, path: /nowhere}")
    assert code == 1 and "/nowhere" in err and "Traceback" not in err
