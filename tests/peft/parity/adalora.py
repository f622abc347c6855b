"""AdaLoRA in the parity matrix; its schedule, and ranks that differ, are in `tests/peft/test_adalora.py`."""

import peft

from jaxft.peft import AdaLoRA
from tests.peft.parity.case import Case


def theirs(**more):
    return peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=10, **more)


CASES = {
    "adalora": Case(
        AdaLoRA(rank=3, init_rank=6, alpha=9, targets=("q_proj", "down_proj"), layers=(0, 2), dropout=0.1),
        lambda: theirs(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], lora_dropout=0.1),
        models=("llama", "qwen2"),
    ),
    "adalora beside settings that only LoRA reads": Case(
        AdaLoRA(rank=3, init_rank=6, alpha=9, targets=("q_proj",)),
        lambda: theirs(target_modules=["q_proj"], use_rslora=True, alpha_pattern={"q_proj": 3}, lora_bias=True),
        models=("llama",),
    ),
    "adalora on conv1d": Case(
        AdaLoRA(rank=3, init_rank=6, alpha=9, targets=("c_attn",)),
        lambda: theirs(target_modules=["c_attn"], fan_in_fan_out=True),
        models=("gpt2",),
    ),
}
