"""Prompts and prefixes. peft keeps what an encoder makes and drops the encoder."""

import peft

from jaxft.peft import Norms, PrefixTuning, PromptTuning, PTuning, PTuningV2
from tests.peft.parity.case import Case

MODELS = (
    "llama",
    "llama_tied",
    "gpt2",
    "gemma2",
    "qwen2",
    "granite",
)  # scaled embeddings in two ways, learnt positions
TASK = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}

CASES = {
    "prompt tuning": Case(
        PromptTuning(tokens=5), lambda: peft.PromptTuningConfig(**TASK), models=MODELS, mergeable=False
    ),
    "prompt tuning beside whole modules": Case(
        [PromptTuning(tokens=5), Norms(targets=("norm",))],
        lambda: peft.PromptTuningConfig(**TASK, modules_to_save=["embed_tokens", "q_proj", "model.norm"]),
        models=("llama", "llama_tied"),
        mergeable=False,
    ),
    "p-tuning": Case(
        PTuning(tokens=5, hidden=16),
        lambda: peft.PromptEncoderConfig(**TASK, encoder_hidden_size=16),
        models=("llama",),
        mergeable=False,
    ),
    "p-tuning by an lstm": Case(
        PTuning(tokens=5, hidden=16, encoder="lstm"),
        lambda: peft.PromptEncoderConfig(**TASK, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
        models=("llama",),
        mergeable=False,
    ),
    "prefix tuning": Case(
        PrefixTuning(tokens=5),
        lambda: peft.PrefixTuningConfig(**TASK),
        models=(*MODELS, "mistral", "gpt_neox"),
        mergeable=False,
    ),
    "prefix by projection": Case(
        PrefixTuning(tokens=5, projection=True, hidden=16),
        lambda: peft.PrefixTuningConfig(**TASK, prefix_projection=True, encoder_hidden_size=16),
        models=("llama",),
        mergeable=False,
    ),
    "p-tuning v2": Case(
        PTuningV2(tokens=5), lambda: peft.PrefixTuningConfig(**TASK), models=("qwen2",), mergeable=False
    ),
}
