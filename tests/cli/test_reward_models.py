"""Reward models as rewards: what transformers says of the same texts, on the policy's very base or of their own."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

import jaxft
from jaxft import config as config_
from jaxft.cli import assemble, reward_models, samples, single
from jaxft.core import tree
from jaxft.models import decoder
from jaxft.peft import store
from jaxft.rollout import reward_model
from jaxft.rollout.reward_model import Reader
from tests.cli.commands import jaxft as run_
from tests.cli.commands import metrics

ASKED = [[{"role": "user", "content": text}] for text in ("Say hi", "Sort: 3 1 2", "Spell dog", "2 and 3")]
SAID = ["hi", "1 2 3", "", "5 and\nmore"]


@pytest.fixture(scope="module")
def judge(tiny, tmp_path_factory):
    """A reward model as an adapter on the tiny model, and as a whole one."""
    folder = tmp_path_factory.mktemp("judge")
    model = jaxft.reward_model(jaxft.load(str(tiny), "float32"), jax.random.key(0))
    methods = [jaxft.peft.LoRA(rank=4, targets=["q_proj", "down_proj"])]
    params = jaxft.peft.adapt(model, jax.random.key(1), methods)
    drawn = iter(jax.random.split(jax.random.key(2), 64))
    own, base = tree.partition(params, tree.trainable_mask(params))
    own = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(drawn), a.shape), own)
    params = tree.combine(own, base)
    store.save(params, model.names, 2, folder / "adapter", methods=methods, base_model_name_or_path=str(tiny))
    model.tokenizer.save_pretrained(folder / "adapter")
    jaxft.save_hf(model, jaxft.merge(params), folder / "whole")
    return folder


def transformers_says(folder, texts):
    import torch
    from transformers import AutoModelForSequenceClassification as Auto
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return Auto.from_pretrained(folder).eval()(**inputs).logits[:, 0].numpy()


def chat(tokenizer, ended=True):
    """The chats as the reward model is trained to read them: with the end of the last turn if it ended."""
    opened = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in ASKED]
    end = tokenizer.apply_chat_template([*ASKED[0], {"role": "assistant", "content": "hi"}], tokenize=False)
    return [o + said + (end.rpartition("hi")[2] if ended else "") for o, said in zip(opened, SAID, strict=True)]


@pytest.mark.parametrize("ended", [True, False])
def test_it_says_what_transformers_says(judge, ended):
    model = jaxft.load(str(judge / "whole"), "float32")
    how = {"dtype": np.float32, "execution": decoder.DEFAULT, "batch": 3}
    score = reward_model.scorer(model.config, model.params, Reader(model.tokenizer), **how)
    want = transformers_says(judge / "whole", chat(model.tokenizer, ended))
    np.testing.assert_allclose(score(ASKED, SAID, [ended] * 4), want, rtol=2e-4, atol=2e-5)
    # texts that are no chats: BOS if the tokenizer puts one, and EOS after what ended
    texts, said = [f"{turns[0]['content']}:" for turns in ASKED], [f" {text}" for text in SAID]
    marks = model.tokenizer.eos_token if ended else ""
    start = model.tokenizer.bos_token if model.tokenizer("")["input_ids"] else ""
    want = transformers_says(judge / "whole", [start + a + b + marks for a, b in zip(texts, said, strict=True)])
    np.testing.assert_allclose(score(texts, said, [ended] * 4), want, rtol=2e-4, atol=2e-5)


def config_of(tiny, path, *more):
    words = [f"model.path={tiny}", "model.dtype=float32", "objective=ppo", f"rewards=[{{name: model, path: {path}}}]"]
    return config_.load(None, [*words, *more])


@pytest.mark.parametrize("unroll", ["never", "always"])
def test_four_views_of_one_base(judge, tiny, unroll):
    """Policy, reference, value and reward, layer by layer too: one array for each weight of the base."""
    config = config_of(tiny, judge / "adapter", f"value.path={judge / 'adapter'}", f"train.unroll={unroll}")
    base = assemble.model(config, None)
    models = reward_models.load(config, base, None)
    run = single.begin(config, base, 4, None, Console(quiet=True), {}, models.params)
    (params,) = run.beside.values()
    ours = {id(a) for name, part in run.frozen.items() if name != "critic" for a in jax.tree.leaves(part)}
    frozen = {"value": run.frozen["critic"], "reward": tree.strip(params)}
    for view in frozen.values():
        arrays = [a for path, a in tree.arrays(view) if a.ndim > 1 and not path.startswith("score")]
        big = [a for a in arrays if a.size >= 64 * 64 // 2]
        assert len(big) >= 8 and all(id(a) in ours for a in big)
    (score,) = (row.make(config.rewards[0].value) for name, row in models.table(
        run.beside, run.dtype, run.how).items() if name == "model")  # fmt: skip
    want = transformers_says(judge / "whole", chat(base.tokenizer))
    np.testing.assert_allclose(score(ASKED, SAID, finished=[True] * 4), want, rtol=2e-4, atol=2e-5)
    # the value model begins where the reward model is
    np.testing.assert_array_equal(run.first.trainable["critic"]["score"].value, params["score"].value)


def test_ppo_against_a_reward_model(capsys, judge, tiny, tmp_path):
    """Eight devices; a true score that is not trained on stands beside; `jaxft eval` judges by the same models."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": [{"role": "user", "content": f"Say {i}"}], "answer": str(i)}) + "\n"
                for i in range(6))
    )  # fmt: skip
    run = tmp_path / "run"
    words = [
        "train", f"model.path={tiny}", "model.dtype=float32", f"data.path={tmp_path / 'rows.jsonl'}", "objective=ppo",
        f"rewards=[{{name: model, path: {judge / 'adapter'}}}, {{name: exact_match, weight: 0}}]",
        "data.eval_examples=2", "data.max_length=64", "rollout.prompts=4", "rollout.samples=2", "train.batch=8",
        "rollout.max_new_tokens=6", "generate.max_new_tokens=6", "train.steps=2", "peft.rank=4", f"run_dir={run}",
    ]  # fmt: skip
    code, _, err = run_(capsys, *words)
    assert code == 0, err
    rows, table = metrics(run), samples.read(run)
    first = next(row for row in rows if "rewards/model/mean" in row)
    assert first["objective/scores"] == pytest.approx(first["rewards/model/mean"], rel=1e-5)
    assert {"eval_reward", "eval_rewards/model", "eval_rewards/exact_match"} <= rows[-1].keys()
    assert rows[-1]["eval_reward"] == pytest.approx(rows[-1]["eval_rewards/model"], rel=1e-6)

    model = jaxft.load(str(judge / "whole"), "float32")
    opened = [row["prompt"] + row["completion"] for row in table if row["finished"] is False][:4]
    want = transformers_says(judge / "whole", opened)
    got = [row["rewards"]["model"] for row in table if row["finished"] is False][:4]
    assert model.config.labels == 1 and len(got) == 4
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)

    code, out, err = run_(capsys, "eval", run, "--json")
    assert code == 0, err
    assert json.loads(out)["rewards/model"] == pytest.approx(rows[-1]["eval_rewards/model"], rel=1e-4)


def test_what_is_no_reward_model_is_refused(judge, tiny, tmp_path):
    config = config_of(tiny, tiny)
    with pytest.raises(ValueError, match="expected one output, the reward"):
        reward_models.load(config, assemble.model(config, None), None)
    with pytest.raises(ValueError, match="only the command line loads"):
        jaxft.rewards.made(jaxft.rewards.REWARDS, [("model", config.rewards[0].value)])
    packed = config_.load(None, [f"model.path={tiny}", "objective=ppo", "model.dtype=float32",
                                 f"rewards=[{{name: model, path: {judge / 'adapter'}, quantize: nf4}}]"])  # fmt: skip
    with pytest.raises(ValueError, match="no quantize"):
        reward_models.load(packed, assemble.model(packed, None), None)
