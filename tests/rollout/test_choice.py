"""Log-probabilities of labels after a prompt, against transformers on the same weights."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import jaxft
from jaxft.rollout import choice

ASSETS = Path(__file__).resolve().parents[2] / "assets"
LABELS = tuple(map(str, range(1, 11)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("choice")
    theirs.save_pretrained(folder)
    return jaxft.load(folder, dtype="float32"), theirs


def probability(theirs, prompt, way):
    with torch.no_grad():
        logits = theirs(torch.tensor([[*prompt, *way]])).logits[0].double().log_softmax(-1)
    return math.exp(sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(way)))


def test_labels_of_one_and_of_several_tokens(models):
    """1 is token 1 or 20 1; 10 is 1 0 or 20 1 0; what goes on as 10 is no 1."""
    ours, theirs = models
    labels = {"1": {(1,), (20, 1)}, "2": {(2,), (20, 2)}, "10": {(1, 0), (20, 1, 0)}}
    prompts = [[5, 6, 7], [9], [3] * 70, [4, 8]]
    found = choice.logprobs(ours.config, ours.params, prompts, labels, batch=3)
    for prompt, said in zip(prompts, found, strict=True):
        p = {way: probability(theirs, prompt, way) for way in itertools.chain(*labels.values())}
        ten = p[1, 0] + p[20, 1, 0]
        expected = {"1": p[1,] + p[20, 1] - ten, "2": p[2,] + p[20, 2], "10": ten}
        assert {label: math.exp(value) for label, value in said.items()} == pytest.approx(expected, rel=1e-4)


def test_how_labels_are_written():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "tiny")
    letters = choice.spellings(tokenizer, ("A", "B"))
    assert all({tokenizer.decode(way) for way in letters[label]} == {label, f" {label}"} for label in "AB")
    numbers = choice.spellings(tokenizer, LABELS)
    assert {tokenizer.decode(way).strip() for way in numbers["10"]} == {"10"}
    assert all(len(way) == len(ten) - 1 for way, ten in zip(sorted(numbers["1"]), sorted(numbers["10"]), strict=True))
    with pytest.raises(ValueError, match=r"labels: the tokenizer writes ' A' as 'A' is"):
        choice.spellings(tokenizer, ("A", " A"))


def test_it_does_not_depend_on_what_is_read_together(models):
    ours, _ = models
    prompts = [np.arange(1, n) % 32 for n in (3, 30, 9, 100, 12)]
    labels = {"a": {(1,)}, "b": {(2, 3)}}
    together = choice.logprobs(ours.config, ours.params, prompts, labels, batch=4)
    alone = [choice.logprobs(ours.config, ours.params, [p], labels, batch=4)[0] for p in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
