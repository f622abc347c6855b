"""LoRA in the parity matrix; its finer points are in `tests/peft/test_hf.py`."""

import peft

from jaxft.peft import LoRA
from tests.peft.parity.case import Case

CASES = {
    "lora": Case(
        LoRA(rank=4, targets=("q_proj", "down_proj"), rank_pattern={"1.mlp.down_proj": 2}),
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"1.mlp.down_proj": 2}),
        models=("llama", "qwen2"),
    ),
    "lora on a tied head": Case(
        LoRA(rank=4, targets=("q_proj", "lm_head")),
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
        models=("llama", "llama_tied"),
    ),
}
