"""Adapters in Hugging Face peft's format, both ways.

What belongs to one method (its config fields and tensors) is that method's row of `METHODS`; here is what all share:
the fields of every config, modules and biases trained whole, and the refusal of what the format cannot hold.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import InPlace, Slot, Weight
from jaxft.peft import METHODS, disk, formats, places, slot_formats, targets, tokens_hf, whole, whole_hf
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.formats import Alone, Fields, Format
from jaxft.peft.slot_formats import SlotFormat
from jaxft.peft.trainable_tokens import TokensWeight

Stored = Format | SlotFormat | Alone
# fields of any method's config that are read here, or say nothing about the maths
COMMON = (
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "inference_mode", "modules_to_save",
    "peft_type", "peft_version", "revision", "task_type",
)  # fmt: skip
NUMBERS = ("r", "init_r", "lora_alpha", "alpha", "randlora_alpha")  # fields of several methods
PATTERNS = ("rank_pattern", "alpha_pattern")
SILENT = (None, False, "", [], {})  # values that say nothing
README = """---
base_model: {base}
library_name: peft
tags:
- {method}
---

A {method} adapter made with jaxft. Load it with `peft`:

    PeftModel.from_pretrained({auto}, "this directory")

or with jaxft: `jaxft.load_adapter({loaded}, "this directory")`.
"""
LANGUAGE = {"auto": "AutoModelForCausalLM.from_pretrained(base)", "loaded": "jaxft.load(base)"}
SCORING = {
    "auto": "AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)",
    "loaded": 'jaxft.reward_model(jaxft.load(base), init="zeros")',
}
CLASSIFIERS = {"score", "classifier"}
"""What peft adds to ``modules_to_save`` of every SEQ_CLS adapter, whichever of them the model has."""


def export(
    where: object, params: tree.Params, names: Names, num_layers: int, changed: Collection[str] = ()
) -> tuple[Fields, Tensors, str]:
    """Config fields, tensors and README of all that ``params`` hold besides the base.

    ``changed``: paths of the model's own arrays that are no longer what they were. Raises AdapterError naming the first
    thing that peft's format has no word for."""
    names = places.rows(names)
    found = {name.path: w for name in names if (w := _adapter(params, name)) is not None}
    found |= {place: w for place, w in params.items() if isinstance(w, Slot)}
    method, form, config, tensors, written = _export(where, found, params, names, num_layers)
    config["peft_type"] = form.peft_type
    remade = [w.base for w in found.values() if isinstance(form, Format) and form.rebuilds(w)]
    others = [(path, a) for path, a in tree.paths(params) if path in changed]
    more, held = whole_hf.export_bases(params, names, [a for _, a in others], form.peft_type)
    tensors |= more
    known = {*map(id, held), *map(id, jax.tree.leaves(remade, is_leaf=tree.is_split))}
    lost = [path for path, a in others if id(a) not in known]
    if lost:
        raise AdapterError(where, f"other arrays of the model itself: {disk.some(lost)}", "the base as it was")
    for fields, more, these in (
        whole_hf.export(params, names, num_layers, written),
        whole_hf.export_biases(where, params, names, num_layers, found),
        tokens_hf.export_beside(where, params, names) if tokens_hf.INDICES in form.fields else ({}, {}, []),
    ):
        config |= fields
        tensors |= more
        written += these
    if not form.biases and "bias" in config:
        raise AdapterError(where, "trained biases", f"none: peft's {form.peft_type} has no such setting")
    if not form.saves and config.pop("modules_to_save"):
        raise AdapterError(where, "modules trained whole", f"none: peft's {form.peft_type} has no such setting")
    if places.follows(params, names) and not _tokens(params, names):
        if places.HEAD in found and places.HEAD not in params:
            raise AdapterError(where, "an adapted head that follows an adapted embedding", "one of the two adapted")
        config["ensure_weight_tying"] = True
    _refuse_rest(where, params, written)
    if isinstance(form, SlotFormat):
        if any(whole.held(params, name) for name in names if name.path == places.TOKENS):
            got = "an embedding trained whole beside a prompt"
            raise AdapterError(where, got, "the model's own, in which peft looks the tokens up")
        tensors = slot_formats.beside(tensors)
    told = SCORING if places.SCORE in params else LANGUAGE
    return config, tensors, README.format(base="{base}", method=method, **told)


def _refuse_rest(where: object, params: tree.Params, written: list[Any]) -> None:
    """Raises AdapterError for an adapter that is not among those written."""
    left = set(map(id, tree.adapters(params))) - set(map(id, written))
    if left:
        kinds = sorted({type(w).__name__ for w in tree.adapters(params) if id(w) in left})
        raise AdapterError(where, f"{', '.join(kinds)} at a place that peft has no word for", "an adapter that it has")


def _tokens(params: tree.Params, names: Names) -> bool:
    """Whether tokens of the embedding train, which a tied head follows in any case."""
    return any(isinstance(places.get(params, name), TokensWeight) for name in names if name.path == places.TOKENS)


def _adapter(params: tree.Params, name: Name) -> Any:
    """The adapter's leaf at one row, if there is one. Raises AdapterError for one adapter on another."""
    w = None if name.kind == "norm" else places.get(params, name)
    if not isinstance(w, Weight) or not w.adapter or isinstance(w, InPlace | TokensWeight):
        return None
    if isinstance(w.base, Weight) and w.base.adapter:
        got = f"a {type(w).__name__} on a {type(w.base).__name__}"
        raise AdapterError(name.path, got, "one adapter on each weight")
    return w


def _export(
    where: object, found: dict[str, Any], params: tree.Params, names: Names, num_layers: int
) -> tuple[str, Stored, Fields, Tensors, list[Any]]:
    """The one method that there is: its name, format, fields, tensors, and the weights that they are of."""
    forms = [(name, m.hf) for name, m in METHODS.items()]
    if not found:
        for name, form in forms:
            if isinstance(form, Alone) and (made := form.export(params, names, num_layers))[2]:
                return name, form, *made
        raise AdapterError(where, "no method that has a name in peft", "one")
    kinds = {type(w) for w in found.values()}
    rows = [(name, form) for name, form in forms if isinstance(form, Format | SlotFormat) and form.leaf in kinds]
    if len(kinds) != 1 or not rows:
        got = "adapters of " + ", ".join(sorted(kind.__name__ for kind in kinds))
        raise AdapterError(where, got, "one method that peft's format can hold")
    name, form = rows[0]
    if isinstance(form, SlotFormat):
        return name, form, *slot_formats.export(form, params), list(found.values())
    return name, form, *formats.export(form, found, params, names, num_layers), list(found.values())


def restore(
    where: Path, config: Fields, tensors: Tensors, params: tree.Params, names: Names, num_layers: int
) -> tree.Params:
    """The parameters with the adapter on them; what is used is taken out of ``tensors``.

    Raises AdapterError naming what is not understood, missing or of another shape."""
    config = _modern(config, tensors)
    _, form = format_named(where, config)
    for field, value in unknown_fields(config, form).items():
        remedy = "It changes what the adapter computes, and jaxft does not know how."
        raise AdapterError(f"{where / disk.CONFIG}: {field}", repr(value), "nothing", remedy)
    refuse_no_numbers(where, config)
    form.refuse(where, config)
    names = places.rows(names)
    modules = tuple(dict.fromkeys(config.get("modules_to_save") or ()))
    if config.get("task_type") == "SEQ_CLS":
        if not any(name.path == places.SCORE for name in names):
            remedy = 'Give the language model that head first: model = jaxft.reward_model(model, init="zeros").'
            raise AdapterError(where, "an adapter of a model that scores sequences (SEQ_CLS)", "one of this", remedy)
        modules = tuple(m for m in modules if m not in CLASSIFIERS - {places.SCORE})
    saved = targets.find_whole(names, num_layers, modules) if modules else []
    if isinstance(form, SlotFormat):
        slot_formats.rename(tensors)
        saved = slot_formats.looked_up(form, tensors, saved)
    whole_hf.drop_copies(config, tensors, saved, num_layers)
    params = whole_hf.replace_bases(where, config, tensors, params, names, saved)
    if isinstance(form, SlotFormat):
        params = slot_formats.restore(form, where, config, tensors, params)
    elif isinstance(form, Alone):
        params = form.restore(where, config, tensors, params, names)
    else:
        params = formats.restore(form, where, config, tensors, params, names)
    params = tokens_hf.restore_beside(where, config, tensors, params, names)
    params = whole_hf.restore(where, config, tensors, params, saved)
    return whole_hf.restore_biases(where, config, tensors, params, names)


def _modern(config: Fields, tensors: Tensors) -> Fields:
    """gpt_neox's head was the module embed_out before transformers 5; its tensors are renamed."""
    old = [key for key in tensors if key.startswith("embed_out.")]
    for key in old:
        tensors[re.sub(r"^embed_out\.", "lm_head.", key)] = tensors.pop(key)
    for field in ("target_modules", "modules_to_save"):
        if old and isinstance(config.get(field), list):
            config = {**config, field: ["lm_head" if m == "embed_out" else m for m in config[field]]}
    return config


def format_named(where: Path, config: Fields) -> tuple[str, Stored]:
    """The method that a config is of, and how it is stored. Raises AdapterError for one that is not known."""
    kind = config.get("peft_type")
    known = {name: m.hf for name, m in METHODS.items() if m.hf is not None}
    found = [(name, form) for name, form in known.items() if form.peft_type == kind and form.claims(config)]
    if not found:
        types = ", ".join(dict.fromkeys(form.peft_type for form in known.values()))
        raise AdapterError(where / disk.CONFIG, f"peft_type {kind!r}", f"one of {types}")
    return found[0]


def unknown_fields(config: Fields, form: Stored) -> Fields:
    """The fields that say something which is not understood."""
    known = {*COMMON, *form.fields}
    return {name: value for name, value in config.items() if name not in known and value not in SILENT}


def no_numbers(config: Fields) -> Fields:
    """The fields of sizes and scales that are none; null is one nowhere but for OFT, which may say blocks instead."""
    said = {name: [config[name]] for name in NUMBERS if name in config}
    if config.get("peft_type") == "OFT":
        said = {name: values for name, values in said.items() if values != [None]}
    if config.get("peft_type") != "ADALORA":  # whose rank_pattern is of lists
        patterns = {name: config.get(name) or {} for name in PATTERNS}
        said |= {name: list(p.values()) if isinstance(p, dict) else [p] for name, p in patterns.items()}
    wrong = [name for name, values in said.items() if any(type(value) not in (int, float) for value in values)]
    return {name: config[name] for name in wrong}


def refuse_no_numbers(where: Path, config: Fields) -> None:
    """Raises AdapterError for a size or scale that is no number."""
    for name, value in no_numbers(config).items():
        expected = "a mapping of modules to numbers" if name in PATTERNS else "a number"
        raise AdapterError(f"{where / disk.CONFIG}: {name}", repr(value), expected, "Set it to what it was made with.")
