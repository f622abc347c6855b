"""Methods whose update is made of tensors other than two factors, in the parity matrix."""

import peft

from jaxft.peft import VeRA
from tests.peft.parity.case import Case

SOME = ("q_proj", "v_proj", "down_proj")

CASES = {
    "vera": Case(
        VeRA(rank=6, targets=SOME),
        lambda: peft.VeraConfig(r=6, target_modules=list(SOME)),
        models=("llama", "qwen2"),
    ),
    "vera on conv1d": Case(
        VeRA(rank=6, targets=("c_attn", "c_proj")),
        lambda: peft.VeraConfig(r=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        models=("gpt2",),
    ),
}
