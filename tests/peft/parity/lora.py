"""The LoRA family in the parity matrix; LoRA's finer points are in `tests/peft/test_hf.py`."""

from typing import Any

import peft

from jaxft.peft import DoRA, LoRA, LoRAFA
from tests.peft.parity.case import Case


def lora(*targets: str, **settings: Any) -> Any:
    return lambda: peft.LoraConfig(r=4, target_modules=list(targets), **settings)


CASES = {
    "lora": Case(
        LoRA(rank=4, targets=("q_proj", "down_proj"), rank_pattern={"1.mlp.down_proj": 2}),
        lora("q_proj", "down_proj", rank_pattern={"1.mlp.down_proj": 2}),
        models=("llama", "qwen2"),
    ),
    "lora on a tied head": Case(
        LoRA(rank=4, targets=("q_proj", "lm_head")), lora("q_proj", "lm_head"), models=("llama", "llama_tied")
    ),
    "lora bias": Case(
        LoRA(rank=4, targets=("q_proj", "up_proj"), lora_bias=True, alpha_pattern={"q_proj": 3}),
        lora("q_proj", "up_proj", lora_bias=True, alpha_pattern={"q_proj": 3}),
        models=("llama", "qwen2"),
    ),
    "lora_fa": Case(LoRAFA(rank=4, targets=("q_proj", "up_proj")), lora("q_proj", "up_proj"), models=("llama",)),
    "dora": Case(
        DoRA(rank=4, alpha=3, rslora=True, rank_pattern={"1.mlp.up_proj": 2}),
        lora(
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            **{"use_dora": True, "use_rslora": True, "lora_alpha": 3, "rank_pattern": {"1.mlp.up_proj": 2}},
        ),
        models=("llama", "qwen2"),
    ),
    "dora on conv1d": Case(
        DoRA(rank=4, targets=("c_attn", "wte")),
        lora("c_attn", "wte", use_dora=True, fan_in_fan_out=True),
        models=("gpt2",),
    ),
    "dora on embedding and tied head": Case(
        DoRA(rank=4, targets=("embed_tokens", "lm_head", "v_proj")),
        lora("embed_tokens", "lm_head", "v_proj", use_dora=True),
        models=("llama", "llama_tied"),
    ),
}
