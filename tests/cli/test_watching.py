"""What shows that a reward is hacked: drift from the reference, lengths, diversity, refusals, beside a true score."""

import json

import numpy as np
import pytest

import jaxft
from jaxft import config as config_
from jaxft.cli import watching
from jaxft.models import decoder
from jaxft.rollout.drift import make_drift
from tests.cli.commands import jaxft as run_
from tests.cli.commands import metrics


@pytest.mark.parametrize("another", [False, True])
def test_drift_is_the_divergence_of_whole_distributions(tiny, adapter, another):
    """Against torch: of a policy with an adapter from the model without, as the same model or as another one."""
    import peft
    import torch
    import transformers

    model = jaxft.load(str(tiny), "float32")
    params = jaxft.load_adapter(model, str(adapter))
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(3, 200, (3, 12)).astype(np.int32), np.array([12, 9, 5])
    segments = (np.arange(12) < lengths[:, None]).astype(np.int32)
    mask = (segments > 0) & (np.arange(12) >= 4)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()

    def says(net):
        with torch.no_grad():
            logits = net(torch.tensor(tokens, dtype=torch.long)).logits.double()
        return torch.log_softmax(logits, -1).numpy()

    before = says(base)
    after = says(peft.PeftModel.from_pretrained(base, adapter).eval())
    apart = np.pad((np.exp(after) * (after - before)).sum(-1)[:, :-1], ((0, 0), (1, 0)))  # at the token that is said
    drift = make_drift(model.config, model.config if another else None, dtype=np.float32, execution=decoder.DEFAULT)
    batch = {"tokens": tokens, "segments": segments, "loss_mask": mask}
    batch["positions"] = np.where(segments > 0, np.arange(12), 0).astype(np.int32)
    got = drift(params, model.params, batch)
    np.testing.assert_allclose(got, np.where(mask, apart, 0).sum(1), rtol=2e-4)
    np.testing.assert_allclose(drift(model.params, model.params, batch), 0, atol=1e-5)


def test_refusals_are_told_by_phrases():
    config = config_.load(None, ["model.path=x"])
    said = ["I can't do that.", "Sure: 4", "well, I CAN\N{RIGHT SINGLE QUOTATION MARK}T say", "As an AI, no"]
    assert watching.refusal_rate(config, said) == {"refusal_rate": 0.75}
    other = config_.load(None, ["model.path=x", "eval.refusals=[sure]"])
    assert watching.refusal_rate(other, said) == {"refusal_rate": 0.25} and watching.refusal_rate(config, []) == {}


def test_side_by_side_for_grpo_too(capsys, tiny, tmp_path):
    """From a policy that is its reference; a true score that is not trained on, and one that is."""
    rows = [{"prompt": [{"role": "user", "content": f"Say {i}"}], "answer": str(i)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "harmless.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text("def longer(prompts, completions):\n    return [len(c) for c in completions]\n")
    words = [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'rows.jsonl'}", "objective=grpo",
        f"rewards=[{{function: '{tmp_path / 'reward.py'}:longer'}}, {{name: exact_match, weight: 0}}]",
        "data.eval_examples=2", "data.max_length=48", "rollout.prompts=4", "rollout.samples=2", "train.batch=8",
        "rollout.max_new_tokens=6", "generate.max_new_tokens=6", "train.steps=2", "peft.rank=4", "optim.lr=0.05",
        "eval.at_start=true", "eval.every=9", "eval.kl=true", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    every = ["eval.refusals=['']", f"eval.harmless={tmp_path / 'harmless.jsonl'}"]  # which any answer holds
    code, _, err = run_(capsys, *words, *every)
    assert code == 0, err
    found = metrics(tmp_path / "run")
    before, after = (row for row in found if "eval_reward" in row)
    assert abs(before["eval_kl"]) < 1e-4 < after["eval_kl"] and after["eval_refusal_rate"] == 1
    names = {"completions/mean_length", "completions/distinct_1", "completions/self_bleu", "rewards/exact_match"}
    assert {f"eval_{name}" for name in names} <= after.keys()
    assert names - {"rewards/exact_match"} <= next(row for row in found if "reward" in row).keys()
    assert 0 < after["eval_completions/mean_length"] <= 6 and 0 <= after["eval_completions/self_bleu"] <= 1
    code, out, err = run_(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0, err
    again = json.loads(out)
    assert again["refusal_rate"] == 1 and again["completions/self_bleu"] == after["eval_completions/self_bleu"]

    for more, told in ((["eval.refusals=[no]"], "`eval.refusals`: nothing is asked without eval.harmless"),
                       (["eval.harmless=gone.jsonl"], "eval.harmless")):  # fmt: skip
        code, _, err = run_(capsys, *words, *more, f"run_dir={tmp_path / 'other'}")
        assert code and told in err, err
    words = [word for word in words if not word.startswith(("rewards", "rollout", "objective"))]
    code, _, err = run_(capsys, *words, "objective=sft")
    assert code and "`eval.kl`: is told of runs on rollouts" in err, err
