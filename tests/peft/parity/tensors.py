"""Methods whose update is made of tensors other than two factors, in the parity matrix."""

import peft

from jaxft.peft import FourierFT, LoHa, LoKr, MiSS, RandLora, SHiRA, VeRA
from tests.peft.parity.case import Case

COPIES = r"\.randlora_[AB]\.default"
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
    "loha": Case(
        LoHa(rank=3, alpha=5, targets=SOME, rank_pattern={"1.mlp.down_proj": 2}, alpha_pattern={"q_proj": 4}),
        lambda: peft.LoHaConfig(
            r=3, alpha=5, target_modules=list(SOME), rank_pattern={"1.mlp.down_proj": 2}, alpha_pattern={"q_proj": 4}
        ),
        models=("llama", "llama_tied"),
    ),
    "lokr": Case(
        LoKr(rank=3, targets=SOME, rank_pattern={"1.mlp.down_proj": 2}, alpha_pattern={"q_proj": 4}),
        lambda: peft.LoKrConfig(
            r=3, target_modules=list(SOME), rank_pattern={"1.mlp.down_proj": 2}, alpha_pattern={"q_proj": 4}
        ),
        models=("llama",),
    ),
    "lokr whole": Case(
        LoKr(rank=40, targets=SOME, layers=(0, 2)),
        lambda: peft.LoKrConfig(r=40, target_modules=list(SOME), layers_to_transform=[0, 2]),
        models=("qwen2",),
    ),
    "lokr of products": Case(
        LoKr(rank=1, decompose_both=True, decompose_factor=8, targets=(*SOME, "lm_head")),
        lambda: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=8, target_modules=[*SOME, "lm_head"]),
        models=("llama", "llama_tied"),
    ),
    "randlora": Case(
        RandLora(rank=5, alpha=10, targets=(*SOME, "up_proj")),
        lambda: peft.RandLoraConfig(r=5, randlora_alpha=10, target_modules=[*SOME, "up_proj"]),
        copies=COPIES,
        models=("llama", "qwen2"),
    ),
    "randlora sparse on conv1d": Case(
        RandLora(rank=6, alpha=12, targets=("c_attn", "c_proj"), basis="sparse"),
        lambda: peft.RandLoraConfig(
            r=6, randlora_alpha=12, target_modules=["c_attn", "c_proj"], sparse=True, fan_in_fan_out=True
        ),
        copies=COPIES,
        models=("gpt2",),
    ),
    "fourierft": Case(
        FourierFT(frequencies=40, targets=SOME, frequencies_pattern={"1.mlp.down_proj": 25, "q_proj": 30}),
        lambda: peft.FourierFTConfig(
            n_frequency=40, target_modules=list(SOME), n_frequency_pattern={"1.mlp.down_proj": 25, "q_proj": 30}
        ),
        models=("llama", "qwen2"),
    ),
    "fourierft on conv1d": Case(
        FourierFT(frequencies=40, scale=90, seed=2**40 + 3, targets=("c_attn", "c_proj")),
        lambda: peft.FourierFTConfig(
            n_frequency=40,
            scaling=90.0,
            random_loc_seed=2**40 + 3,
            target_modules=["c_attn", "c_proj"],
            fan_in_fan_out=True,
        ),
        models=("gpt2",),
    ),
    "shira": Case(
        SHiRA(rank=2, targets=SOME),
        lambda: peft.ShiraConfig(r=2, target_modules=list(SOME)),
        models=("llama", "llama_tied"),
    ),
    "miss": Case(
        MiSS(rank=7, targets=SOME),
        lambda: peft.MissConfig(r=7, target_modules=list(SOME)),
        models=("llama",),
    ),
    "miss mini": Case(
        MiSS(rank=8, variant="mini", mini_rank=4, targets=SOME, layers=(0, 1)),
        lambda: peft.MissConfig(
            r=8, init_weights="mini", mini_r=4, target_modules=list(SOME), layers_to_transform=[0, 1]
        ),
        models=("llama",),
    ),
    "miss bat": Case(
        MiSS(rank=8, variant="bat", targets=SOME),
        lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=list(SOME)),
        models=("qwen2",),
    ),
}
