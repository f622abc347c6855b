"""Rotary settings of a Hugging Face config, in the old spelling (rope_theta, rope_scaling) and the new
(rope_parameters), to `Rope`."""

import math
from typing import Any

from jaxft.models.fields import Fields
from jaxft.models.rope import Rope

FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor mscale mscale_all_dim beta_fast beta_slow "
        "truncate".split()
    ),
    "longrope": frozenset("factor original_max_position_embeddings attention_factor short_factor long_factor".split()),
    "llama3": frozenset("factor original_max_position_embeddings low_freq_factor high_freq_factor".split()),
    "proportional": frozenset({"factor"}),
}
NEEDED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ALWAYS = frozenset("rope_type type rope_theta partial_rotary_factor".split())


def read(
    fields: Fields,
    head_dim: int,
    *,
    max_positions: int,
    theta: float = 10000.0,
    partial: float | None = None,
    original_max: int | None = None,
) -> Rope:
    """The model's rotary table. Refuses unknown settings.

    ``theta``, ``partial`` and ``original_max`` are the family's defaults; ``partial`` None: the family's attention
    rotates whole heads and a partial_rotary_factor is refused."""
    scaling, parameters = fields.get("rope_scaling", {}), fields.get("rope_parameters", {})
    top = {
        "rope_theta": fields.get("rope_theta", theta),
        "partial_rotary_factor": fields.get("partial_rotary_factor", 1.0 if partial is None else partial),
    }
    settings = top | (scaling or parameters)  # transformers: rope_scaling wins where both are given
    whole = settings["partial_rotary_factor"] in (None, 1, 1.0)
    if partial is None and not whole:
        family, got = fields.raw["model_type"], settings["partial_rotary_factor"]
        raise ValueError(
            f"{fields.where}: partial_rotary_factor={got!r} is not supported: {family} rotates whole heads"
        )
    original = fields.get("original_max_position_embeddings", 0) or original_max
    if original:  # beside the settings it wins over the one inside them, as in transformers
        settings["original_max_position_embeddings"] = original
    return build(settings, head_dim, max_positions, fields.where)


def build(settings: dict[str, Any], head_dim: int, max_positions: int, where: str) -> Rope:
    """One ``rope_parameters`` dict to a `Rope`. Raises ValueError for an unknown type or key."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)  # phi3's first name for it
    if kind not in FIELDS:
        raise ValueError(f"{where}: rope_type={kind!r} is not known; expected one of {sorted(FIELDS)}")
    known = FIELDS[kind] | ALWAYS | {"original_max_position_embeddings"}
    extra = {k: v for k, v in settings.items() if k not in known and v is not None}
    if extra:
        raise ValueError(
            f"{where}: rope settings {extra} are not understood for rope_type={kind!r}; known: {sorted(known)}"
        )
    present = {k: v for k, v in settings.items() if v is not None}

    def get(name: str, default: Any = None) -> Any:
        return present.get(name, default)

    absent = [name for name in NEEDED.get(kind, ()) if get(name) is None]
    if absent:
        raise ValueError(f"{where}: rope settings {settings} lack {absent}, which rope_type={kind!r} needs")
    partial = float(get("partial_rotary_factor", 1.0))
    dim = int(head_dim * partial)
    common: dict[str, Any] = {"theta": float(get("rope_theta", 10000.0)), "kind": kind}
    original = int(get("original_max_position_embeddings", max_positions))
    if kind == "proportional":
        return Rope(head_dim, **common, factor=float(get("factor", 1.0)), rotated=2 * int(partial * head_dim // 2))
    if kind == "default":
        return Rope(dim, **common)
    if kind == "dynamic":  # stretches by max_position_embeddings, whatever the original length says
        return Rope(dim, **common, factor=float(get("factor")), original_max=max_positions)
    factor = get("factor")
    factor = max_positions / original if factor is None else float(factor)
    if kind == "linear":
        return Rope(dim, **common, factor=factor)
    common |= {"factor": factor, "original_max": original}
    if kind == "llama3":
        low, high = float(get("low_freq_factor")), float(get("high_freq_factor"))
        return Rope(dim, **common, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return Rope(
            dim,
            **common,
            attention_factor=_yarn_factor(settings, factor),
            beta_fast=float(get("beta_fast") or 32),
            beta_slow=float(get("beta_slow") or 1),
            truncate=bool(get("truncate", True)),
        )
    attention = get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = tuple(map(float, get("short_factor"))), tuple(map(float, get("long_factor")))
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != dim // 2:
            raise ValueError(f"{where}: {name} has {len(factors)} entries; expected {dim // 2}, one per rotated pair")
    return Rope(dim, **common, attention_factor=float(attention), short_factor=short, long_factor=long)


def _yarn_factor(settings: dict[str, Any], factor: float) -> float:
    """Multiplier of cos and sin: YaRN's 0.1 ln(factor) + 1, or what the checkpoint says."""

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    some, everything = settings.get("mscale"), settings.get("mscale_all_dim")
    return mscale(factor, some) / mscale(factor, everything) if some and everything else mscale(factor)
