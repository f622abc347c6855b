"""LoRA in peft's format: torch's [out, in] factors of each layer's module, to and from our stacks.

Linear: ``M.lora_A.weight`` [r, in], ``M.lora_B.weight`` [out, r] and ``M.lora_B.bias``. Embedding:
``M.lora_embedding_A`` [r, vocab] and ``M.lora_embedding_B`` [features, r]. Padding to the largest rank and layers that
are not adapted exist only here. What was taken out of the base is written as factors of its own: [A, A0] [B; -B0] is an
adapter of the base as it was. An adapter of a base that LoftQ quantised says so, and the base is quantised again when
it is loaded.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.peft import lora, places
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.formats import Fields, Format, padded
from jaxft.peft.lora import LoRA, LoRAWeight
from jaxft.peft.lora_init import LoftQ

# init_lora_weights that leave the base as it is; the others (pissa, olora, loftq, corda, lora_ga) subtract from it
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
BIAS = "lora_B.bias"
QUANTIZER = "normal_float"  # under this key peft's loftq_config says that the quantiser was ours


def config_of(config: Fields) -> LoRA:
    """Our settings from peft's."""
    return LoRA(**settings(config))


def settings(config: Fields) -> dict[str, Any]:
    """Fields of our config from peft's."""
    fields = {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "dropout": float(config.get("lora_dropout", 0.0)),
        "rslora": bool(config.get("use_rslora", False)),
        "lora_bias": bool(config.get("lora_bias", False)),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "ensure_weight_tying": bool(config.get("ensure_weight_tying")),
    }
    if config.get("init_lora_weights") == "loftq":
        made = config["loftq_config"]
        fields |= {"init": "loftq", "loftq": LoftQ(made["loftq_bits"], made["loftq_iter"])}
    return fields


def describe(w: LoRAWeight) -> Fields:
    """What all adapted modules have in common; an embedding has neither dropout nor a quantised base."""
    fields: Fields = (
        {"lora_dropout": None, "init_lora_weights": None, "loftq_config": None}
        if w.lookup
        else {"lora_dropout": w.rate, "init_lora_weights": True}
    )
    # newer fields only where they say something: an older peft refuses a field it does not know
    fields |= ({"use_rslora": True} if w.rslora else {}) | ({"lora_bias": True} if w.bias is not None else {})
    if w.loftq is not None:
        bits, iterations = w.loftq
        made = {"loftq_bits": bits, "loftq_iter": iterations, QUANTIZER: True}
        fields |= {"init_lora_weights": "loftq", "loftq_config": made}
    return fields


def values(w: LoRAWeight) -> Fields:
    """Rank and alpha of one layer."""
    rank = int(w.rank) * (1 if w.a0 is None else 2)
    return {"r": rank, "lora_alpha": _alpha(float(w.scale), rank, w.rslora)}


def write(w: LoRAWeight) -> Tensors:
    """One layer's factors, without padding."""
    a, b = np.asarray(w.a)[:, : w.rank], np.asarray(w.b)[: w.rank]
    if w.a0 is not None:
        a = np.concatenate([a, np.asarray(w.a0)[:, : w.rank]], axis=1)
        b = np.concatenate([b, -np.asarray(w.b0)[: w.rank]])
    factors = dict(zip(EMBEDDING if w.lookup else LINEAR, (a.T, b.T), strict=True))
    return factors if w.bias is None else factors | {BIAS: np.asarray(w.bias)}


def read(w: Any, tensors: Tensors) -> Any:
    """One layer with its factors."""
    a, b = (tensors[key].T for key in (EMBEDDING if w.lookup else LINEAR))
    fields = {"a": a[:, : w.rank], "b": b[: w.rank]}
    if w.a0 is not None:
        fields |= {"a0": a[:, w.rank :], "b0": -b[w.rank :]}
    fields = {name: padded(array, np.asarray(getattr(w, name))) for name, array in fields.items()}
    return dataclasses.replace(w, **fields, bias=tensors.get(BIAS))


def tied_head(found: dict[str, Any], names: Names) -> Tensors:
    """With ensure_weight_tying peft also stores the embedding's factors as the head's, transposed."""
    w = found.get(places.TOKENS)
    if w is None or not w.tied:
        return {}
    (head,) = (name.module for name in names if name.path == places.HEAD)
    return {f"{head}.{LINEAR[0]}": np.asarray(w.b), f"{head}.{LINEAR[1]}": np.asarray(w.a)}


def drop_tied_head(where: object, config: Fields, tensors: Tensors, params: tree.Params) -> Fields:
    """Takes out the head's copy of a tied embedding's factors."""
    del where
    tied = config.get("ensure_weight_tying") and places.HEAD not in params
    if tied and any(key.endswith(EMBEDDING[0]) for key in tensors):
        for key in LINEAR:
            tensors.pop(f"lm_head.{key}", None)
    return config


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """The alpha that gives back the float32 ``scale``: a round number wherever one does."""
    exact = scale * (np.sqrt(rank) if rslora else rank)
    for alpha in (round(exact), round(exact, 3), round(exact, 6)):
        if lora.scales(np.array(rank), np.array(float(alpha)), rslora) == np.float32(scale):
            return alpha
    return float(exact)


def refuse(where: object, config: Fields) -> None:
    """Raises AdapterError for an initialisation that changed the base, unless it can be done again."""
    init = config.get("init_lora_weights", True)
    if init not in INITS and not (init == "loftq" and (config.get("loftq_config") or {}).get(QUANTIZER)):
        remedy = (
            "That initialisation subtracted from the base weights, so the factors alone do not fit the original model. "
            "Save it again in peft with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
        raise AdapterError(f"{where}: init_lora_weights", repr(init), "an adapter of the original base", remedy)


FORMAT = Format(
    peft_type="LORA",
    leaf=LoRAWeight,
    fields=(
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights", "lora_bias",
        "loftq_config", "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "corda_config",
        "lora_ga_config", "trainable_token_indices",
    ),
    config=config_of,
    describe=describe,
    suffixes=(*LINEAR, *EMBEDDING, BIAS),
    write=write,
    read=read,
    values=values,
    patterned={"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
    refuse=refuse,
    common=tied_head,
    prepare=drop_tied_head,
    rebuilds=lambda w: w.loftq is not None,
    claims=lambda config: not config.get("use_dora"),
)  # fmt: skip
