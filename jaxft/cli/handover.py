"""How a stage takes the model that the one before it made: kept (its adapter trains on), merged, or stacked.

`lay` writes that into the stage's config, as a user would: peft.method=adapter with the adapter's folder, or model.path
with the merged model's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jaxft import peft, run_dir
from jaxft.border import check as border
from jaxft.border.errors import ConfigError
from jaxft.border.reading import Source, Typed
from jaxft.cli import heads
from jaxft.config import RunConfig
from jaxft.peft import bottleneck
from jaxft.peft.slots import PROMPT

Take = Literal["none", "keep", "merge", "stack"]
MERGED = "merged"
"""Folder in a run's: its adapter worked into its model."""
ALWAYS = ("dtype", "attention")
"""Keys of `model` that say how to compute, whatever the model."""
scores = heads.scores


def whole(config: RunConfig) -> bool:
    """Whether a run makes a whole model instead of an adapter."""
    return all(isinstance(choice.value, peft.Full) for choice in config.peft)


def how(take: Any, before: RunConfig | None) -> Take:
    """What `take` says, or means if it is not there. Raises ConfigError."""
    if take is not None and take not in get_args(Take):
        raise ConfigError(f"`take`: got {take!r}; expected one of {', '.join(get_args(Take))}")
    if before is None:
        if take not in (None, "none"):
            raise ConfigError(f"`take`: got {take}; no stage before this one trains a model: leave it out")
        return "none"
    if take in ("keep", "stack") and whole(before):
        raise ConfigError(
            f"`take`: got {take}; the stage before trains the model itself and leaves no adapter: take: merge takes it"
        )
    return take or ("merge" if whole(before) else "keep")


def lay(
    laid: Source, own: Source, take: Take, before: RunConfig, folder: Path, grown: Sequence[str] = ()
) -> tuple[str, ...]:
    """Puts the model of the run in ``folder`` into a stage's values, and returns lines for what of them is not used.

    ``grown``: new tokens that the model has already. Raises ConfigError for keys that the stage has of its ``own`` and
    that the taken model decides."""
    model, written = dict(_plain(laid.values.get("model")) or {}), _plain(own.values.get("model")) or {}
    decided = [f"model.{key}" for key in written if key in ("path", "revision", "init")]
    if take != "merge":
        decided += [f"model.{key}" for key in written if key not in (*ALWAYS, "new_tokens", "path", "revision", "init")]
        decided += ["quant"] if "quant" in own.values else []
        decided += ["peft"] if take == "keep" and "peft" in own.values else []
    if decided:
        remedy = "take: none begins from a model of its own" + (
            "; take: stack trains another adapter" * (take == "keep")
        )
        raise ConfigError(
            f"`{decided[0]}`: a stage with take: {take} has that of the stage before; leave it out ({remedy})"
        )
    tokens = [token for token in _plain(model.get("new_tokens")) or [] if token not in grown]
    if tokens and take != "merge":
        raise ConfigError(f"`model.new_tokens`: got {tokens[0]}; under an adapter the vocabulary stays: take: merge")
    given, left = {key: model[key] for key in ALWAYS if key in model}, []
    for key in ALWAYS:
        given.setdefault(key, getattr(before.model, key))
    if take == "merge":
        made = folder / (run_dir.WHOLE if whole(before) else MERGED)
        kept = {key: value for key, value in model.items() if key in ("pad_token", "vocab_multiple")}
        laid.values["model"] = {**kept, **given, "path": str(made), "new_tokens": tokens}
        return ()
    anew = _anew(before)
    base = {name: value for name, value in border.plain(before.model).items() if name not in ALWAYS}
    if anew:
        base |= {"path": str(folder / run_dir.BASE), "revision": None, "new_tokens": []}
    laid.values["model"] = base | given
    if "quant" in laid.values:
        left.append("quant: that of the stage before")
    laid.values["quant"] = {"method": "none"} if anew else border.plain(before.quant)
    adapter = {"method": "adapter", "path": str(folder / run_dir.ADAPTER), "frozen": take == "stack"}
    methods = _plain(laid.values.get("peft"))
    if take == "keep":
        left += ["peft: the adapter of the stage before is trained on"] if methods is not None else []
        laid.values["peft"] = adapter
    else:
        laid.values["peft"] = [adapter, *(methods if isinstance(methods, list) else [methods or {"method": "lora"}])]
    for section in ("model", "quant", "peft"):
        for place in [place for place in laid.places if place[0] == section and (section != "peft" or take == "keep")]:
            del laid.places[place]
    return tuple(left)


def check(config: RunConfig, take: Take, before: RunConfig, name: str) -> None:
    """Raises ConfigError where the model of the stage ``name`` cannot be taken so."""
    if scores(before) and not scores(config):
        raise ConfigError(
            f"`objective.name`: {config.objective.name} trains a language model, stage {name} makes a reward model; "
            "put it after this stage, or say take: none and model.path"
        )
    if before.model.init == "random" and take != "merge":
        raise ConfigError(f"`take`: got {take}; stage {name} draws its model anew and keeps no base: take: merge")
    if take == "merge":
        refuse_merge(before, name)
    elif any(isinstance(choice.value, peft.Slotted) and choice.value.slot == PROMPT for choice in before.peft):
        raise ConfigError(f"`take`: got {take}; stage {name} learns a prompt, which cannot be trained on: take: none")
    if take == "stack" and all(isinstance(choice.value, peft.Full) for choice in config.peft[1:]):
        raise ConfigError("`peft.method`: got full on a frozen adapter; expected an adapter above it, or take: merge")


def refuse_merge(config: RunConfig, name: str) -> None:
    """Raises ConfigError for a run whose adapter is no map on the weights, or has no base to be merged into."""
    kinds = (peft.Slotted, bottleneck.Houlsby, bottleneck.Pfeiffer, bottleneck.Parallel)
    if unmergeable := [choice.name for choice in config.peft if isinstance(choice.value, kinds)]:
        raise ConfigError(
            f"stage {name} trains {unmergeable[0]}, which cannot be merged; expected a map on the weights"
        )
    if config.model.init == "random" and not whole(config):
        raise ConfigError(f"stage {name} draws its model anew (model.init=random) and keeps no base to merge into")


def _anew(config: RunConfig) -> bool:
    """Whether a run writes a four-bit base of its own, because its method changes that."""
    packs = config.quant.method in ("nf4", "fp4")
    return packs and any(getattr(choice.value, "init", None) in ("loftq", "qpissa") for choice in config.peft)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value
