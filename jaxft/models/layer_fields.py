"""Layer kinds of a Hugging Face config: layer_types, or the older pattern that a family made them from."""

from jaxft.models.config import Layer
from jaxft.models.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
OLD = {"attention": FULL}


def types(fields: Fields, default: list[str]) -> list[str]:
    """``layer_types``, one of FULL and SLIDING for each layer; ``default`` where the config has none."""
    depth = fields.get("num_hidden_layers")
    found: list[str] = [OLD[t] if t in OLD else t for t in fields.get("layer_types", default)]
    unknown = sorted(set(found) - {FULL, SLIDING})
    if unknown or len(found) != depth:
        raise ValueError(
            f"{fields.where}: layer_types has {len(found)} entries, unknown among them {unknown}; expected "
            f"num_hidden_layers={depth} entries, each of {[FULL, SLIDING]}"
        )
    return found


def windows(fields: Fields, kinds: list[str], window: int | None) -> list[int | None]:
    """The window of each layer. Raises ValueError if a layer slides and ``window`` is None."""
    if SLIDING in kinds and window is None:
        raise ValueError(
            f"{fields.where}: layer_types says {SLIDING!r} but sliding_window is null or switched off; expected a "
            f"number of tokens, or {FULL!r} throughout"
        )
    return [window if kind == SLIDING else None for kind in kinds]


def from_max_window(fields: Fields, window: int | None = 4096, start: int = 28) -> tuple[Layer, ...]:
    """qwen's layers: with use_sliding_window those from max_window_layers on slide, unless layer_types says which."""
    used, window = fields.get("use_sliding_window", False), fields.nullable("sliding_window", window)
    window = window if used else None
    start, depth = fields.get("max_window_layers", start), fields.get("num_hidden_layers")
    default = [FULL if window is None or i < start else SLIDING for i in range(depth)]
    return tuple(Layer(window=w) for w in windows(fields, types(fields, default), window))
