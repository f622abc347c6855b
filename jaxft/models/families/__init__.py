"""Model families: one small file each, from a Hugging Face config.json to `ModelConfig` and a name map.

`FAMILIES` is the literal table, keyed by ``model_type``. A family module has ``config(fields) -> ModelConfig`` and
``names(fields) -> Names``.
"""

import dataclasses
import difflib
from types import ModuleType
from typing import Any

from jaxft.core.names import Name, Names
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

CLASSIFIER = "ForSequenceClassification"


def read(raw: dict[str, Any], where: str = "config.json") -> tuple[ModelConfig, Names]:
    """A parsed config.json to (ModelConfig, Names).

    Raises ValueError for an unknown model_type, a missing field, and every field that is not understood."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, 1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(f"{where}: model_type={kind!r} is not supported{hint}; known families: {sorted(FAMILIES)}")
    fields = Fields(raw, where)
    for name in ("add_cross_attention", "is_encoder_decoder"):
        fields.expect(name, False, why="only decoders without an encoder are implemented")
    fields.expect("pruned_heads", {}, why="pruned heads are not implemented")
    config, names = FAMILIES[kind].config(fields), FAMILIES[kind].names(fields)
    fields.finish()
    _refuse_impossible(config, where)
    count = labels(raw, where)
    return scoring(config, names, count) if count else (config, names)


def labels(raw: dict[str, Any], where: str = "config.json") -> int:
    """Outputs of the head of a sequence classifier, as which a reward model is stored; 0: it is none.

    Raises ValueError for a number that no head has."""
    if not any(name.endswith(CLASSIFIER) for name in raw.get("architectures") or ()):
        return 0
    named = raw.get("id2label")
    count = raw.get("num_labels", raw.get("_num_labels", 2)) if named is None else len(named)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{where}: got {count!r} labels (id2label, num_labels); expected at least 1")
    return count


def scoring(config: ModelConfig, names: Names, labels: int) -> tuple[ModelConfig, Names]:
    """The same decoder with a head ``score`` [D, labels] instead of that over the vocabulary."""
    rows = tuple(name for name in names if name.path != "head")
    config = dataclasses.replace(config, labels=labels, tie_embeddings=False)
    return config, (*rows, Name("score", "score", "linear"))


def _refuse_impossible(config: ModelConfig, where: str) -> None:
    """Sizes that no checkpoint of a decoder can have."""
    sizes = {
        n: getattr(config, n)
        for n in ("vocab_size", "hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
    }
    bad = [f"{name}={size!r}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]
    if not config.layers:
        bad.append("no layers")
    if not bad and config.num_heads % config.num_kv_heads:
        bad.append(f"{config.num_heads} heads over {config.num_kv_heads} key heads")
    if not bad and config.ropes and any(rope.dim % 2 for rope in config.ropes):
        bad.append("an odd number of rotated features")
    if bad:
        raise ValueError(
            f"{where}: got {', '.join(bad)}; expected positive sizes, at least one layer, heads that are a multiple "
            "of the key heads, and an even number of rotated features"
        )
