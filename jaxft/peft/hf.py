"""Adapters in Hugging Face peft's format, both ways.

What belongs to one method (its config fields and tensors) is that method's row of `METHODS`; here is what all share:
the directory, the fields of every config, modules and biases trained whole, and the refusal of anything left over.
Nothing is returned before everything has been verified.
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import InPlace, Weight
from jaxft.peft import METHODS, disk, formats, places, targets, whole_hf
from jaxft.peft.disk import AdapterError
from jaxft.peft.formats import Format

# fields of any method's config that are read here, or say nothing about the maths
COMMON = (
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "inference_mode", "modules_to_save",
    "peft_type", "peft_version", "revision", "task_type",
)  # fmt: skip
README = """---
base_model: {base}
library_name: peft
tags:
- {method}
---

A {method} adapter made with jaxft. Load it with `peft`:

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "this directory")

or with jaxft: `jaxft.load_adapter(jaxft.load(base), "this directory")`.
"""


def save_adapter(
    params: tree.Params,
    names: Names,
    num_layers: int,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    task_type: str = "CAUSAL_LM",
    overwrite: bool = False,
) -> Path:
    """Writes the adapter that ``params`` hold as a directory that peft loads; returns its path.

    It appears complete or not at all; one that holds something is refused, unless it is an adapter and ``overwrite``.
    Plain arrays that a pattern trained are no part of an adapter (`modules_to_save` and `bias` are). On several hosts
    every process must call it. Raises AdapterError."""
    target = Path(directory).expanduser().absolute()
    disk.refuse_occupied(target, overwrite)
    _meet("save_adapter: looked")
    names = places.rows(names)
    found = {name.path: w for name in names if (w := _adapter(params, name)) is not None}
    method, form = _format_of(target, found)
    config, tensors = formats.export(form, found, params, names, num_layers)
    parts = (
        whole_hf.export(params, names, num_layers),
        whole_hf.export_biases(target, params, names, num_layers, found),
    )
    for fields, more in parts:
        config |= fields
        tensors |= more
    if not form.biases and config.pop("bias") != "none":
        remedy = f"peft's {form.peft_type} has no such setting: merge, and save the whole model with jaxft.save_hf."
        raise AdapterError(target, "trained biases", "an adapter alone", remedy)
    config |= {
        "peft_type": form.peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
    }
    config |= {"ensure_weight_tying": True} if places.follows(params, names) else {}
    if jax.process_index() == 0:
        readme = README.format(base=base_model_name_or_path or "", method=method)
        disk.write(target, config, tensors, readme)
    _meet("save_adapter: written")
    return target


def _meet(where: str) -> None:
    """Waits for every process of a run on several hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _adapter(params: tree.Params, name: Name) -> Any:
    """The adapter's leaf at one row, if there is one. Raises AdapterError for one adapter on another."""
    w = None if name.kind == "norm" else places.get(params, name)
    if not isinstance(w, Weight) or not w.adapter or isinstance(w, InPlace):
        return None
    if isinstance(w.base, Weight) and w.base.adapter:
        got = f"a {type(w).__name__} on a {type(w.base).__name__}"
        remedy = "Merge the first one into the base, save that model, and save the second one on it."
        raise AdapterError(name.path, got, "one adapter on each weight", remedy)
    return w


def _format_of(target: Path, found: dict[str, Any]) -> tuple[str, Format]:
    """The one method that the adapters belong to, with its format."""
    if not found:
        remedy = "Save weights trained whole with jaxft.save_hf(model, jaxft.merge(params), directory)."
        raise AdapterError(target, "parameters without an adapter", "an adapter of one method", remedy)
    kinds = {type(w) for w in found.values()}
    rows = [(name, m.hf) for name, m in METHODS.items() if m.hf is not None and m.hf.leaf in kinds]
    if len(kinds) != 1 or not rows:
        got = "adapters of " + ", ".join(sorted(kind.__name__ for kind in kinds))
        remedy = "Merge them and save the whole model with jaxft.save_hf."
        raise AdapterError(target, got, "one method that peft's format can hold", remedy)
    return rows[0]


def load_adapter(params: tree.Params, names: Names, num_layers: int, directory: str | os.PathLike[str]) -> tree.Params:
    """The parameters with an adapter made by peft, or by `save_adapter`, on them; the base's buffers are shared.

    Raises AdapterError naming what is not understood, missing, left over or of another shape."""
    where = Path(directory).expanduser().absolute()
    config, tensors = _modern(*disk.read(where))
    form = _format_named(where, config)
    _refuse_fields(where, config, form)
    form.refuse(where, config)
    names = places.rows(names)
    modules = tuple(config.get("modules_to_save") or ())
    saved = targets.find_whole(names, num_layers, modules) if modules else []
    params = whole_hf.replace_bases(where, config, tensors, params, names, saved)
    params = formats.restore(form, where, config, tensors, params, names)
    params = whole_hf.restore(where, config, tensors, params, saved)
    params = whole_hf.restore_biases(where, config, tensors, params, names)
    if tensors:
        remedy = "Nothing here uses them, so the model would not be the one that was saved."
        raise AdapterError(
            where, f"unused tensors {disk.some(sorted(tensors))}", "only tensors of this adapter", remedy
        )
    return params


def _modern(config: dict[str, Any], tensors: disk.Tensors) -> tuple[dict[str, Any], disk.Tensors]:
    """gpt_neox's head was the module embed_out before transformers 5."""
    if not any(key.startswith("embed_out.") for key in tensors):
        return config, tensors
    for field in ("target_modules", "modules_to_save"):
        if isinstance(config.get(field), list):
            config = {**config, field: ["lm_head" if m == "embed_out" else m for m in config[field]]}
    return config, {re.sub(r"^embed_out\.", "lm_head.", key): array for key, array in tensors.items()}


def _format_named(where: Path, config: dict[str, Any]) -> Format:
    kind = config.get("peft_type")
    known = [m.hf for m in METHODS.values() if m.hf is not None]
    forms = [form for form in known if form.peft_type == kind and form.claims(config)]
    if not forms:
        types = ", ".join(dict.fromkeys(form.peft_type for form in known))
        raise AdapterError(where / disk.CONFIG, f"peft_type {kind!r}", f"one of {types}")
    return forms[0]


def _refuse_fields(where: Path, config: dict[str, Any], form: Format) -> None:
    """Raises AdapterError for a field that says something which is not understood."""
    known = {*COMMON, *form.fields}
    for field, value in config.items():
        if field not in known and value not in (None, False, "", [], {}):
            remedy = "It changes what the adapter computes, and jaxft does not know how."
            raise AdapterError(f"{where / disk.CONFIG}: {field}", repr(value), "nothing", remedy)
