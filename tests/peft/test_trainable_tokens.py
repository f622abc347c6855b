"""Trained tokens beside an adapter of a tied head, which follows them."""

import dataclasses
import json

import chex
import jax
import peft
import pytest

from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.peft import OFT, DoRA, LoRA, TrainableTokens, disk, places
from tests.peft import pairs
from tests.peft.parity.tokens import SEEN

MODEL, KEY = "llama_tied", jax.random.key(0)
TOKENS = TrainableTokens(tokens=SEEN)
HEADS = {
    "lora": LoRA(rank=2, targets=("lm_head",)),
    "dora": DoRA(rank=2, targets=("lm_head",)),
    "oft": OFT(block_size=8, targets=("lm_head",)),
}


@pytest.mark.parametrize("first", ["tokens", "head"])
@pytest.mark.parametrize("head", ["lora", "oft"])
def test_an_adapted_tied_head_follows(head, first):
    """One that has not trained yet changes nothing, so the logits are those of the tokens alone."""
    alone = pairs.adapted(MODEL, TOKENS, KEY)
    methods = [TOKENS, HEADS[head]] if first == "tokens" else [HEADS[head], TOKENS]
    params = jaxft_peft.adapt(pairs.model(MODEL), KEY, methods)
    row = next(name for name in places.rows(pairs.ours(MODEL).names) if name.path == places.TOKENS)
    moved = dataclasses.replace(places.get(params, row), rows=places.get(alone, row).rows)
    params = places.put(params, row, moved)
    chex.assert_trees_all_close(pairs.logits(MODEL, params), pairs.logits(MODEL, alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_merged_and_stripped(head):
    params = pairs.adapted(MODEL, [TOKENS, HEADS[head]], KEY)
    merged = tree.merge(params)
    chex.assert_trees_all_close(pairs.logits(MODEL, merged), pairs.logits(MODEL, params), rtol=0, atol=1e-5)
    chex.assert_trees_all_equal(tree.strip(params), pairs.ours(MODEL).params)


FOLLOWS = {"targets": ("embed_tokens",), "ensure_weight_tying": True}
NATIVE = {
    "head trained whole": [TOKENS, LoRA(rank=2, targets=("q_proj",), modules_to_save=("lm_head",))],
    "lora of both, following": [LoRA(rank=2, **FOLLOWS), HEADS["lora"]],
    "lora of the head, embedding whole": [
        dataclasses.replace(HEADS["lora"], modules_to_save=("embed_tokens",), ensure_weight_tying=True)
    ],
}


@pytest.mark.parametrize("case", NATIVE)
def test_what_peft_has_no_word_for_is_kept_in_our_format(case, tmp_path):
    params = pairs.adapted(MODEL, NATIVE[case], KEY)
    directory = pairs.save(MODEL, params, tmp_path / "a", methods=NATIVE[case])
    assert json.loads((directory / disk.CONFIG).read_text())["peft_type"] == "JAXFT"
    chex.assert_trees_all_equal(pairs.load(MODEL, directory), params)
    chex.assert_trees_all_close(pairs.logits(MODEL, tree.merge(params)), pairs.logits(MODEL, params), rtol=0, atol=1e-5)


def test_a_head_follows_an_embedding_that_is_told_to_be_followed():
    alone = pairs.adapted(MODEL, LoRA(rank=2, **FOLLOWS), KEY)
    model = pairs.model(MODEL)
    model.params = alone
    params = jaxft_peft.adapt(model, KEY, HEADS["lora"])
    chex.assert_trees_all_close(pairs.logits(MODEL, params), pairs.logits(MODEL, alone), rtol=0, atol=1e-5)


def test_peft_ties_tokens_that_are_listed_in_one_order(tmp_path):
    """Those of the head in another order are its own."""
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": list(SEEN), "lm_head": list(reversed(SEEN))},
    )
    theirs = pairs.peft_model(MODEL, config)
    params = pairs.load(MODEL, pairs.peft_save(theirs, tmp_path / "theirs"))
    chex.assert_trees_all_close(pairs.logits(MODEL, params), pairs.torch_logits(theirs), rtol=0, atol=1e-5)
    again = pairs.load(MODEL, pairs.save(MODEL, params, tmp_path / "again"))
    chex.assert_trees_all_equal(again, params)
