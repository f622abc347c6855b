"""generate, chat, merge and export on a model and an adapter that transformers and peft made."""

import io
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from jaxft.cli import push, target
from tests.cli.commands import jaxft

FLOAT = "model.dtype=float32"


def logits(folder, adapter=None):
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def reference(folder, prompt, count):
    """Greedy continuation by transformers of one chat prompt."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


GREEDY = (FLOAT, "generate.temperature=0", "generate.max_new_tokens=8")


def test_generate_is_what_transformers_generates(capsys, tiny):
    code, out, err = jaxft(capsys, "generate", tiny, *GREEDY, "--prompt", "Sort: 3 1 2", "--json")
    assert code == 0, err
    assert json.loads(out)["completion"] == reference(tiny, "Sort: 3 1 2", 8)


def test_generate_from_a_file_and_standard_input(capsys, tiny, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    code, out, _ = jaxft(capsys, "generate", tiny, *GREEDY, "--file", tmp_path / "prompts.txt", "--json")
    assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    code, piped, _ = jaxft(capsys, "generate", tiny, *GREEDY, "--json")
    assert code == 0 and json.loads(piped) == json.loads(out.splitlines()[0])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, _, err = jaxft(capsys, "generate", tiny, *GREEDY)
    assert code == 2 and "the prompts are empty" in err


def test_chat_streams_what_generate_says(capsys, tiny, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Sort: 3 1 2\n/reset\n\nSort: 3 1 2\n/quit\nnever read\n"))
    code, out, err = jaxft(capsys, "chat", tiny, *GREEDY)
    answer = reference(tiny, "Sort: 3 1 2", 8)
    assert code == 0, err
    assert out == f"{answer}\n{answer}\n"


def test_chat_remembers_the_conversation(capsys, tiny, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    _, remembered, _ = jaxft(capsys, "chat", tiny, *GREEDY)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/reset\ntwo\n"))
    _, forgotten, _ = jaxft(capsys, "chat", tiny, *GREEDY)
    assert remembered.splitlines()[0] == forgotten.splitlines()[0] and remembered != forgotten


ROWS = [("one", " two"), ("three", " four"), ("Sort: 3 1 2", " 1 2 3"), ("Spell dog", " d o g"), ("a", " b")]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS))
    return file


def torch_loss(folder, adapter=None):
    """Mean negative log-likelihood, over all rows, of each completion and its EOS after its prompt."""
    import peft
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    bos = tokenizer("")["input_ids"]
    total, count = 0.0, 0
    for prompt, completion in ROWS:
        given = bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = bos + tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        assert whole[: len(given)] == given, "the prompt is a prefix in tokens too"
        whole += [tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
        total -= sum(logp[i - 1, whole[i]].item() for i in range(len(given), len(whole)))
        count += len(whole) - len(given)
    return total / count


def test_eval_is_torchs_loss(capsys, tiny, adapter, rows):
    words = [FLOAT, f"data.path={rows}", "data.max_length=32", "generate.max_new_tokens=4", "--json"]
    for given, on in ((tiny, None), (adapter, adapter)):
        code, out, err = jaxft(capsys, "eval", given, *words)
        assert code == 0, err
        values = json.loads(out)
        assert values["loss"] == pytest.approx(torch_loss(tiny, on), abs=1e-4)
        assert values["replies"] == 5 and values["exact_match"] == 0.0 and values["examples"] == 5


def test_eval_counts_exact_replies(capsys, tiny, tmp_path):
    code, out, _ = jaxft(capsys, "generate", tiny, *GREEDY, "--prompt", "one", "--json")
    said = json.loads(out)["completion"].strip()
    chats = [[{"role": "user", "content": "one"}, {"role": "assistant", "content": text}] for text in (said, "no")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    words = [
        *GREEDY,
        f"data.path={tmp_path / 'chats.jsonl'}",
        "data.max_length=64",
        "--replies",
        tmp_path / "said.jsonl",
    ]
    code, out, err = jaxft(capsys, "eval", tiny, *words)
    assert code == 0, err
    assert "exact match" in out and "50.0% of 2 replies" in out and "perplexity" in out
    assert [json.loads(line)["answer"] for line in (tmp_path / "said.jsonl").read_text().splitlines()] == [said, "no"]


def test_eval_asks_for_data(capsys, tiny):
    code, _, err = jaxft(capsys, "eval", tiny)
    assert code == 2 and "data.path=rows.jsonl" in err


def test_merge_gives_the_adapted_models_logits(capsys, tiny, adapter, tmp_path):
    code, out, err = jaxft(capsys, "merge", adapter, FLOAT, "--out", tmp_path / "merged")
    assert code == 0 and "from_pretrained" in out, err
    assert abs(logits(tmp_path / "merged") - logits(tiny, adapter)).max() < 1e-4
    code, _, err = jaxft(capsys, "merge", adapter, FLOAT, "--out", tmp_path / "merged")
    assert code == 1 and "not empty" in err and "Traceback" not in err


def test_export_of_the_adapter_alone(capsys, tiny, adapter, tmp_path):
    code, _, err = jaxft(capsys, "export", adapter, FLOAT, "--adapter", "--out", tmp_path / "adapter")
    assert code == 0, err
    assert abs(logits(tiny, tmp_path / "adapter") - logits(tiny, adapter)).max() < 1e-6
    code, _, err = jaxft(capsys, "export", tiny, "--adapter", "--out", tmp_path / "none")
    assert code == 2 and "has no adapter" in err and not (tmp_path / "none").exists()


def test_export_says_where_to(capsys, tiny):
    code, _, err = jaxft(capsys, "export", tiny)
    assert code == 2 and "--out FOLDER, --push-to-hub ORG/NAME" in err


def test_push_offline_and_without_a_token(capsys, tiny, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = jaxft(capsys, "export", tiny, "--push-to-hub", "me/mine")
    assert code == 1 and "HF_HUB_OFFLINE is set" in err and "hf upload me/mine FOLDER" in err and "Traceback" not in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, err = jaxft(capsys, "export", tiny, "--push-to-hub", "me/mine")
    assert code == 1 and "hf auth login" in err


def test_push_where_the_hub_does_not_answer(tmp_path, monkeypatch):
    import huggingface_hub

    class Nowhere(huggingface_hub.HfApi):
        def __init__(self):
            super().__init__(endpoint="http://127.0.0.1:9", token="hf_none")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Nowhere)
    with pytest.raises(push.PushError, match="the hub cannot be reached"):
        push.folder(tmp_path, "me/mine", private=False)


def test_targets(tiny, adapter, tmp_path):
    assert target.find(str(tiny)).config.model.path == str(tiny) and target.find(str(tiny)).adapter is None
    assert target.find(str(adapter)) == target.Target(target.find(str(tiny)).config, adapter)
    assert target.find("sft_full", ["model.path=x", "data.path=y"]).config.peft[0].name == "full"
    (tmp_path / "config.yaml").write_text(f"model: {{path: {tiny}}}\n")
    with pytest.raises(ValueError, match="expected a run, an adapter, a model or a config before"):
        target.find("model.path=x")
    with pytest.raises(ValueError, match="the run has no result yet"):
        target.find(str(tmp_path))
    (tmp_path / "adapter").symlink_to(adapter)
    found = target.find(str(tmp_path), ["generate.seed=3"])
    assert found.adapter == tmp_path / "adapter" and found.config.generate.seed == 3
    (tmp_path / "adapter").unlink()
    (tmp_path / "model").symlink_to(tiny)
    assert target.find(str(tmp_path)).config.model.path == str(tmp_path / "model")
    with pytest.raises(ValueError, match=r"got model\.path=x beside it, which would take its place"):
        target.find(str(tmp_path), ["model.path=x"])


def test_a_target_that_is_none_is_not_the_base(capsys, tiny, adapter, tmp_path):
    """What `model.path` names is the base of an adapter, never a stand-in for one that is not there."""
    half = shutil.copytree(adapter, tmp_path / "half")
    (half / "adapter_config.json").unlink()
    for name, said in (("/no/such", "no such folder here"), (half, "no adapter_config.json"), (tiny, "model.safetens")):
        for verb, *words in (["generate", "--prompt", "hi", "--raw"], ["merge", "--out", tmp_path / "out"]):
            code, out, err = jaxft(capsys, verb, name, *words, f"model.path={tiny}")
            assert code in (1, 2) and not out and said in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_an_adapters_config_that_is_no_json_object(capsys, adapter, tmp_path, text):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter_config.json").write_text(text)
    code, _, err = jaxft(capsys, "generate", broken, "--prompt", "hi")
    assert code == 1 and "expected a JSON object" in err and "Traceback" not in err


def test_an_adapter_that_computes_nothing_is_refused(capsys, adapter, tmp_path):
    """Numbers that are none, in its config or its tensors."""
    for number, (name, value) in enumerate((("r", "four"), ("lora_alpha", None), ("rank_pattern", {"q_proj": "4"}))):
        broken = shutil.copytree(adapter, tmp_path / str(number))
        config = json.loads((broken / "adapter_config.json").read_text())
        (broken / "adapter_config.json").write_text(json.dumps({**config, name: value}))
        code, _, err = jaxft(capsys, "generate", broken, *GREEDY, "--prompt", "hi")
        assert code == 1 and f"adapter_config.json: {name}: got" in err and "Traceback" not in err, err
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(tensors))
    tensors[first][0, 0] = float("nan")
    broken = shutil.copytree(adapter, tmp_path / "nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    code, _, err = jaxft(capsys, "generate", broken, *GREEDY, "--prompt", "hi")
    assert code == 1 and f"{first}: got 1 of" in err and "Traceback" not in err, err
