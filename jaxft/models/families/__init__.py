"""Model families: one small file each, from a Hugging Face config.json to `ModelConfig` and a name map.

`FAMILIES` is the literal table, keyed by ``model_type``. A family module has ``config(fields) -> ModelConfig`` and
``names(fields) -> Names``.
"""

import difflib
from types import ModuleType
from typing import Any

from jaxft.core.names import Names
from jaxft.models.config import ModelConfig
from jaxft.models.families import (
    gemma2,
    gemma3_text,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from jaxft.models.fields import Fields

FAMILIES: dict[str, ModuleType] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
}


def read(raw: dict[str, Any], where: str = "config.json") -> tuple[ModelConfig, Names]:
    """A parsed config.json to (ModelConfig, Names).

    Raises ValueError for an unknown model_type, a missing field, and every field that is not understood."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, 1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(f"{where}: model_type={kind!r} is not supported{hint}; known families: {sorted(FAMILIES)}")
    fields = Fields(raw, where)
    config, names = FAMILIES[kind].config(fields), FAMILIES[kind].names(fields)
    fields.finish()
    return config, names
