"""Methods that train some of the model's own arrays, in the parity matrix."""

import peft

from jaxft.peft import BitFit, Norms
from tests.peft.parity.case import Case

CASES = {
    "norms": Case(
        Norms(),
        lambda: peft.LNTuningConfig(target_modules=r".*(norm|layernorm|ln_1|ln_2|ln_f)"),
        models=("llama", "gpt2"),
    ),
    "norms of some layers": Case(
        Norms(targets=r".*\.[02]\.input_layernorm|model.norm"),
        lambda: peft.LNTuningConfig(
            target_modules=r".*\.[02]\.input_layernorm|model.norm", modules_to_save=["lm_head"]
        ),
        models=("llama",),
    ),
    "added biases": Case(
        BitFit(targets=("q_proj", "down_proj")),
        lambda: peft.BeftConfig(target_modules=["q_proj", "down_proj"]),
        models=("llama",),
    ),
}  # fmt: skip
