"""Adapters to and from their directories: in peft's format where it can hold all of an adapter, else in our own.

Both are a directory of the same two files, which `load` tells apart. Nothing is returned, or written, before everything
has been verified.
"""

import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.core.weight import PARAMETER, InPlace, Weight, role
from jaxft.peft import METHODS, disk, hf, method_of, native, places
from jaxft.peft.disk import AdapterError
from jaxft.peft.formats import Format
from jaxft.peft.trainable_tokens import TokensWeight


def save(
    params: tree.Params,
    names: Names,
    num_layers: int,
    directory: str | os.PathLike[str],
    *,
    methods: Sequence[Any] = (),
    base: tree.Params | None = None,
    changed: Collection[str] = (),
    new_tokens: Collection[int] = (),
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes all that ``params`` hold besides the base as a directory; returns its path.

    What of the model itself is no longer what it was (trained by a pattern, quantised anew) is known by the paths
    ``changed``, by ``methods``, the configs that made ``params``, or by comparison with ``base``, the model's own
    parameters; ``new_tokens`` are ids that the base was given. The directory appears complete or not at all;
    one that holds something is refused, unless it is an adapter and ``overwrite``. On several hosts every process must
    call it. Raises AdapterError."""
    target = Path(directory).expanduser().absolute()
    disk.refuse_occupied(target, overwrite)
    _meet("save: looked")
    params = tree.map_weights(lambda path, w: _own_stacked(w), tree.dropout_keys(params, None))
    trained = _selected(params, methods)
    other = {*_grown(params, new_tokens), *_rebuilt(params), *changed}
    other |= set() if base is None else native.changed(params, base)
    try:
        if trained:
            raise AdapterError(target, "plain arrays trained by a pattern", "an adapter")
        config, tensors, readme = hf.export(target, params, names, num_layers, other)
    except AdapterError:  # peft has no word for it
        config, tensors = native.export(target, params, trained | other, methods)
        readme = native.README
    source = base_model_name_or_path
    task = "SEQ_CLS" if places.SCORE in params else "CAUSAL_LM"
    config |= {"base_model_name_or_path": source, "task_type": task, "inference_mode": True}
    if jax.process_index() == 0:
        disk.write(target, config, tensors, readme.format(base=source or ""))
    _meet("save: written")
    return target


def check(where: object, params: tree.Params, names: Names, num_layers: int) -> None:
    """Raises AdapterError, naming the field, where ``params`` hold what `save` could not write: writes nothing."""
    try:
        native.describe(where, params)
    except AdapterError as error:
        try:
            hf.export(where, params, names, num_layers)
        except AdapterError:
            raise error from None


def load(params: tree.Params, names: Names, num_layers: int, directory: str | os.PathLike[str]) -> tree.Params:
    """The parameters with an adapter on them, made by peft or by `save`; the base's buffers are shared.

    Raises AdapterError naming what is not understood, missing, left over or of another shape."""
    where = Path(directory).expanduser().absolute()
    config, tensors = disk.read(where)
    if config.get("peft_type") == native.PEFT_TYPE:
        params = native.restore(where, config, tensors, params)
    else:
        try:
            params = hf.restore(where, config, tensors, params, names, num_layers)
        except AdapterError:
            raise
        except ValueError as error:  # of a setting that is refused here, or of a module that this model lacks
            raise AdapterError(where, f"what cannot be made here ({error})", "an adapter of this model") from error
    if tensors:
        remedy = "Nothing here uses them, so the model would not be the one that was saved."
        raise AdapterError(
            where, f"unused tensors {disk.some(sorted(tensors))}", "only tensors of this adapter", remedy
        )
    return params


def _selected(params: tree.Params, methods: Sequence[Any]) -> set[str]:
    """Paths of the model's own arrays that the patterns of ``methods`` select."""
    patterns = [pattern for config in methods if (pattern := method_of(config).select(config)) is not None]
    if not patterns:
        return set()
    chosen = [tree.trainable_mask(params, pattern) for pattern in patterns]
    return {path for mask in chosen for path, hit in tree.paths(mask) if any(jax.tree.leaves(hit))}


def _grown(params: tree.Params, new_tokens: Collection[int]) -> set[str]:
    """Paths of an embedding and head whose new rows are not all trained, so that only the base has them."""
    found = set()
    for path in (places.TOKENS, places.HEAD) if new_tokens else ():
        w: Any = tree.get(params, path) if path in (places.TOKENS, *params) else None
        held = False
        while isinstance(w, Weight):
            rows = {int(i) for i in disk.host(w.ids)} if isinstance(w, TokensWeight) else set()
            held |= isinstance(w, InPlace) or rows >= set(new_tokens)
            path, w = f"{path}/base", w.base
        found |= set() if held or w is None else {path}
    return found


def _rebuilt(params: tree.Params) -> set[str]:
    """Paths of the bases that an adapter made anew from the model's own."""
    forms = [method.hf for method in METHODS.values() if isinstance(method.hf, Format)]
    found = set()
    for path, w in tree.paths(params, inside=False):
        while isinstance(w, Weight):
            path = f"{path}/base"
            found |= {path for form in forms if isinstance(w, form.leaf) and form.rebuilds(w)}
            w = getattr(w, "base", None)
    return found


def _own_stacked(w: Any) -> Any:
    """A Weight whose own arrays are stacked again where unrolling has split them; the base stays as it is."""
    if not isinstance(w, Weight):
        return w
    fields = {f.name: (f, getattr(w, f.name)) for f in dataclasses.fields(w)}  # type: ignore[arg-type]
    own = {n: v for n, (f, v) in fields.items() if w.adapter and role(f) != PARAMETER}
    return dataclasses.replace(
        w,  # type: ignore[type-var]
        **{n: tree.stack_layers(v) for n, v in own.items()},
        **{n: _own_stacked(v) for n, (_, v) in fields.items() if isinstance(v, Weight) and n not in own},
    )


def _meet(where: str) -> None:
    """Waits for every process of a run on several hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
