"""Trainable tokens in the parity matrix."""

import peft

from jaxft.peft import LoRA, TrainableTokens
from tests.peft import pairs
from tests.peft.parity.case import Case

SEEN = tuple(int(i) for i in pairs.TOKENS[0, [9, 3, 5]])  # not in order

CASES = {
    "tokens": Case(
        TrainableTokens(tokens=SEEN),
        lambda: peft.TrainableTokensConfig(token_indices=list(SEEN)),
        models=("llama", "llama_tied", "gpt2"),
    ),
    "tokens of the head too": Case(
        TrainableTokens(tokens=SEEN, head=True),
        lambda: peft.TrainableTokensConfig(token_indices=list(SEEN), target_modules=["embed_tokens", "lm_head"]),
        models=("llama",),
    ),
    "lora and tokens": Case(
        [LoRA(rank=2, targets=("q_proj",)), TrainableTokens(tokens=SEEN)],
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=list(SEEN)),
        models=("llama", "llama_tied"),
    ),
    "tokens and lora of the head": Case(
        [TrainableTokens(tokens=SEEN), LoRA(rank=2, targets=("q_proj", "lm_head"))],
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], trainable_token_indices=list(SEEN)),
        models=("llama", "llama_tied"),
    ),
    "tokens of the head too, and lora": Case(
        [TrainableTokens(tokens=SEEN, head=True), LoRA(rank=2, targets=("q_proj",), bias="all")],
        lambda: peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            bias="all",
            trainable_token_indices={"embed_tokens": [SEEN[0]], "lm_head": [7]},
        ),
        models=("qwen2", "qwen2_tied_mqa"),
    ),
}  # fmt: skip
