"""OFT, BOFT, HRA, RoAd and (IA)^3 in the parity matrix; in peft only the last can adapt a Conv1D.

The vocabulary is 97, a prime: RoAd cannot adapt the head of these models.
"""

import peft

from jaxft.peft import BOFT, HRA, IA3, OFT, RoAd
from tests.peft.parity.case import Case

ATTENTION, TIED = ("q_proj", "v_proj"), ("k_proj", "lm_head")

CASES = {
    "oft": Case(
        OFT(targets="all-linear"),  # 32 is no divisor of the 48 of down_proj
        lambda: peft.OFTConfig(target_modules="all-linear"),
        models=("llama", "qwen2"),
    ),
    "oft on a tied head": Case(
        OFT(targets=TIED, blocks=3, neumann_terms=None, block_share=True),
        lambda: peft.OFTConfig(
            target_modules=[*TIED], r=3, oft_block_size=0, use_cayley_neumann=False, block_share=True
        ),
        models=("llama", "llama_tied"),
    ),
    "oft on an embedding": Case(
        OFT(targets=("embed_tokens",), block_size=8, neumann_terms=4),
        lambda: peft.OFTConfig(target_modules=["embed_tokens"], oft_block_size=8, num_cayley_neumann_terms=4),
        models=("llama", "llama_tied"),
    ),
    "coft": Case(
        OFT(targets=ATTENTION, block_size=8, coft_eps=0.5, layers=(1, 2)),
        lambda: peft.OFTConfig(
            target_modules=[*ATTENTION], oft_block_size=8, coft=True, eps=0.5, layers_to_transform=[1, 2]
        ),
        models=("qwen2",),
    ),
    "boft": Case(
        BOFT(targets=ATTENTION),
        lambda: peft.BOFTConfig(target_modules=[*ATTENTION], boft_dropout=0.1),
        models=("llama", "qwen2"),
    ),
    "boft on a tied head": Case(
        BOFT(targets=TIED, blocks=2, layers=(0,)),
        lambda: peft.BOFTConfig(target_modules=[*TIED], boft_block_size=0, boft_block_num=2),
        models=("llama_tied",),
    ),
    "hra": Case(
        HRA(targets="all-linear", rank=4),
        lambda: peft.HRAConfig(target_modules="all-linear", r=4),
        models=("llama", "qwen2"),
    ),
    "hra on a tied head": Case(
        HRA(targets=TIED, rank=3, gram_schmidt=True),
        lambda: peft.HRAConfig(target_modules=[*TIED], r=3, apply_GS=True),
        models=("llama_tied",),
    ),
    "road": Case(
        RoAd(targets=ATTENTION, group_size=16),
        lambda: peft.RoadConfig(target_modules=[*ATTENTION], group_size=16),
        models=("llama", "qwen2"),
    ),
    "road_2": Case(
        RoAd(targets=ATTENTION, group_size=8, variant="road_2", layers=(0, 2)),
        lambda: peft.RoadConfig(target_modules=[*ATTENTION], group_size=8, variant="road_2"),
        models=("qwen2",),
    ),
    "road_4": Case(
        RoAd(targets=ATTENTION, group_size=8, variant="road_4"),
        lambda: peft.RoadConfig(target_modules=r".*\.[12]\..*\.(q|v)_proj", group_size=8, variant="road_4"),
        models=("qwen2",),
    ),
    "ia3": Case(
        IA3(),
        lambda: peft.IA3Config(),
        models=("llama", "qwen2", "gpt2"),
    ),
    "ia3 on a tied head": Case(
        IA3(targets=("q_proj", "o_proj", "lm_head"), feedforward=("q_proj",), layers=(0, 1)),
        lambda: peft.IA3Config(target_modules=["q_proj", "o_proj", "lm_head"], feedforward_modules=["o_proj"]),
        models=("llama_tied",),
    ),
}  # fmt: skip
