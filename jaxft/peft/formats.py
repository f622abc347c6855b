"""A method's own part of Hugging Face's adapter format, as a few functions of one layer.

A method says which tensors one layer of its Weight becomes (`write`) and how they are read back (`read`); stacking,
layers that are not adapted, per-module patterns, and the refusal of what is missing, left over or misshapen are the
same for all and live here.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Shared, Weight
from jaxft.peft import disk, places, sites, targets
from jaxft.peft.disk import AdapterError, Tensors

Fields = dict[str, Any]
BY_INDEX = "layers_to_transform"


@dataclass(frozen=True)
class Format:
    """How peft stores one method."""

    peft_type: str
    """Its name in adapter_config.json."""
    leaf: type
    """The Weight (or Slot) that holds it."""
    fields: tuple[str, ...]
    """Config fields that are read, or that change nothing a trained adapter computes; any other set one is refused.
    With `layers_to_transform` among them some layers are chosen by index, else by full module names."""
    config: Callable[[Fields], Any]
    """Our config from peft's fields; which modules and layers are adapted is taken from the tensors."""
    describe: Callable[[Any], Fields]
    """Fields of a whole leaf, which all of them must agree on; None: one that this leaf has no part in."""
    suffixes: tuple[str, ...]
    """All that a tensor of one module may be called after the module's name."""
    write: Callable[[Any], Tensors]
    """One layer (numpy arrays; ``base`` a shape) to tensors by suffix, as torch holds them and without padding."""
    read: Callable[[Any, Tensors], Any]
    """The inverse: a layer as ``config.wrap`` made it, with what was stored in place of what was drawn."""
    values: Callable[[Any], Fields] = lambda w: {}
    """Fields of one layer."""
    patterned: Mapping[str, str] = field(default_factory=dict)
    """Those of them that may differ by module, and the field that holds the exceptions: r -> rank_pattern."""
    refuse: Callable[[object, Fields], None] = lambda where, config: None
    """(where, config): raises AdapterError for a value of a known field that is not understood."""
    claims: Callable[[Fields], bool] = lambda config: True
    """Whether a config of this type is this method's, where several methods share a type."""
    common: Callable[[dict[str, Any], Names], Tensors] = lambda found, names: {}
    """Tensors that are stored once, from all leaves by path; a name that begins with / is the whole name."""
    of_all: Callable[[Fields, dict[str, Any], Names], Fields] = lambda config, found, names: {}
    """Fields that tell of all leaves by path; ``config`` holds the others."""
    prepare: Callable[[object, Fields, Tensors, tree.Params], Fields] = lambda where, config, tensors, params: config
    """Looks at everything first: may take tensors out, and add to the fields what `config` needs of them."""
    shared: Callable[[object, Fields, Tensors, list[tuple[int, int]]], Any] = lambda where, config, tensors, shapes: (
        None
    )
    """What all modules have in common (`Site.shared`), from tensors that are stored once, which it takes out; last the
    (in, out) of each adapted row."""
    biases: bool = True
    """Whether peft can train biases beside it."""
    saves: bool = True
    """Whether peft can train other modules whole beside it."""
    rebuilds: Callable[[Any], bool] = lambda w: False
    """Whether ``config.wrap`` makes this leaf's base, which is not the model's own, anew from the model's."""


@dataclass(frozen=True)
class Alone:
    """How peft stores a method that trains arrays of the model itself, where no other method adapts a weight."""

    peft_type: str
    """Its name in adapter_config.json."""
    fields: tuple[str, ...]
    """Config fields that are read, or that change nothing a trained adapter computes; any other set one is refused."""
    export: Callable[[tree.Params, Names, int], tuple[Fields, Tensors, list[Weight]]]
    """Config fields, tensors, and the weights that they are of; nothing where there are none."""
    restore: Callable[[object, Fields, Tensors, tree.Params, Names], tree.Params]
    """Puts the method on the parameters; takes what it reads out of the tensors."""
    refuse: Callable[[object, Fields], None] = lambda where, config: None
    claims: Callable[[Fields], bool] = lambda config: True
    biases: bool = False
    saves: bool = True


def export(
    form: Format, found: dict[str, Any], params: tree.Params, names: Names, num_layers: int
) -> tuple[Fields, Tensors]:
    """Config fields and tensors of the leaves ``found`` by path; ``names`` with the head's row.

    Raises AdapterError for modules of different settings where peft's config has one for all of them."""
    del params
    rows = [name for name in names if name.path in found]
    leaves = {name.path: host(found[name.path]) for name in rows}
    tensors: Tensors = dict(form.common(leaves, names))
    chosen = {path: np.asarray(w.adapted) for path, w in leaves.items()}
    values: dict[str, Fields] = {}
    for name in rows:
        described = form.describe(leaves[name.path])
        for module, layer in layers_of(name, num_layers, leaves[name.path]):
            tensors |= {f"{module}.{end}": array for end, array in form.write(layer).items()}
            values[module] = described | form.values(layer)
    config = _agreed(form, values)
    own = tuple(form.patterned)
    most = collections.Counter(tuple(v[key] for key in own) for v in values.values()).most_common(1)[0][0]
    for key, usual in zip(own, most, strict=True):
        each = targets.patterns(chosen, names, num_layers, {m: v[key] for m, v in values.items()})
        config[key] = usual
        config[form.patterned[key]] = {ending: value for ending, value in each.items() if value != usual}
    modules, layers = targets.describe(chosen, names, num_layers, BY_INDEX in form.fields)
    config["target_modules"] = modules
    if BY_INDEX in form.fields:
        config[BY_INDEX] = layers
    if "fan_in_fan_out" in form.fields:
        config["fan_in_fan_out"] = any(name.kind == "conv1d" for name in rows)
    return config | form.of_all(config, leaves, names), tensors


def _agreed(form: Format, values: dict[str, Fields]) -> Fields:
    """The fields without a pattern, which all modules must tell alike. Raises AdapterError where they do not."""
    agreed: Fields = {}
    said = (key for told in values.values() for key, value in told.items() if value is not None)
    for key in dict.fromkeys(key for key in said if key not in form.patterned):
        # a field that is not told is off; None has no part in it
        told = [(module, value) for module, v in values.items() if (value := v.get(key, False)) is not None]
        first, agreed[key] = told[0]
        for module, value in told:
            if value != agreed[key]:
                expected = f"one value for all modules, as peft's {form.peft_type} has it"
                got = f"{agreed[key]!r} for {first}, {value!r} for {module}"
                raise AdapterError(key, got, expected, "Save the adapter of each on its own.")
    return agreed


def restore(
    form: Format, where: object, config: Fields, tensors: Tensors, params: tree.Params, names: Names
) -> tree.Params:
    """Wraps every module that has tensors, and takes those out of ``tensors``; ``names`` with the head's row.

    Raises AdapterError for a tensor that is missing or of another shape, and where the modules that have tensors are
    not those that the config selects."""
    num_layers = tree.num_layers(params)
    config = form.prepare(where, config, tensors, params)
    settings = form.config(config)
    key = jax.random.key(0)  # what is drawn is replaced
    chosen = {
        name: held for name in names if name.kind != "norm" and (held := _held(form, tensors, name, num_layers)).any()
    }
    used = {m for name, held in chosen.items() for m in targets.adapted(name, num_layers, held)}
    shared = form.shared(where, config, tensors, [places.sizes(params, name) for name in chosen])
    for name, held in chosen.items():
        params = sites.wrap(params, settings, name, held if name.stacked else held[0], key, shared=shared)
        made = places.get(params, name)
        params = places.put(params, name, filled(form, where, tensors, name, num_layers, made))
    refuse_other_targets(where, config, names, num_layers, used)
    return params


def _held(form: Format, tensors: Tensors, name: Name, num_layers: int) -> np.ndarray:
    """bool[layers]: the modules of a row that have tensors."""
    return np.array([any(f"{m}.{end}" in tensors for end in form.suffixes) for m in name.modules(num_layers)])


def filled(form: Format, where: object, tensors: Tensors, name: Name, num_layers: int, made: Any) -> Any:
    """The leaf ``made`` of one row with each adapted layer read; what is used is taken out of ``tensors``."""
    whole = host(made)
    arrays = {n: np.array(v) for n, v in _arrays(whole).items() if isinstance(v, np.ndarray)}
    for module, layer in layers_of(name, num_layers, whole):
        stored = {
            end: disk.take(where, tensors, f"{module}.{end}", array.shape) for end, array in form.write(layer).items()
        }
        new = form.read(layer, stored)
        at = name.modules(num_layers).index(module) if name.stacked else ...
        for field_name, array in arrays.items():
            array[at] = getattr(new, field_name)
    return dataclasses.replace(made, **{n: jnp.asarray(a) for n, a in arrays.items()})


def in_common(found: Mapping[str, Any], *fields: str) -> list[np.ndarray]:
    """The `Shared` fields that all leaves hold. Raises AdapterError where they hold several."""
    leaves = [[getattr(w, name).value for name in fields] for w in found.values()]
    if any(not np.array_equal(a, b) for other in leaves[1:] for a, b in zip(leaves[0], other, strict=True)):
        got = "adapters that do not share their frozen matrices"
        raise AdapterError(disk.some(list(found)), got, "one adapter of all these modules", "Save each one on its own.")
    return leaves[0]


def host(w: Any) -> Any:
    """The leaf with its own arrays in this host's memory; its base stays where it is."""
    return dataclasses.replace(w, **{n: jax.tree.map(disk.host, v) for n, v in _arrays(w).items()})


def layers_of(name: Name, num_layers: int, w: Any) -> list[tuple[str, Any]]:
    """(torch module, one layer's weight with a shape for its base) of every adapted layer."""
    hits = np.atleast_1d(np.asarray(w.adapted))
    bare = dataclasses.replace(w, base=jax.ShapeDtypeStruct(w.base.shape[-2:], w.dtype))

    def layer(i: int) -> Any:
        return dataclasses.replace(bare, **{n: v[i] for n, v in _arrays(bare).items()}) if name.stacked else bare

    return [(m, layer(i)) for i, m in enumerate(name.modules(num_layers)) if hits[i]]


def _arrays(w: Any) -> Fields:
    """The fields of a leaf that hold arrays of its own."""
    fields = {f.name: getattr(w, f.name) for f in dataclasses.fields(w) if f.name != "base"}
    return {n: v for n, v in fields.items() if isinstance(v, np.ndarray | np.generic | jax.Array | Shared | Weight)}


def padded(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The array with zeros behind it on every axis, up to the shape of ``like``."""
    return np.pad(array, [(0, wide - own) for own, wide in zip(array.shape, like.shape, strict=True)])


def refuse_other_targets(
    where: object,
    config: Fields,
    names: Names,
    num_layers: int,
    used: set[str],
    kinds: tuple[str, ...] = targets.ADAPTABLE,
) -> None:
    """Raises AdapterError where the modules with tensors, ``used``, are not those (of these kinds) that the config
    selects, which are the ones peft adapts."""
    wanted = config.get("target_modules")
    if not wanted:
        raise AdapterError(f"{where}: target_modules", repr(wanted), "the modules that were adapted")
    wanted = wanted if isinstance(wanted, str) else tuple(wanted)
    layers = config.get(BY_INDEX)
    layers = [layers] if isinstance(layers, int) else layers or None
    exclude = config.get("exclude_modules") or ()
    selected = set()
    for name in names:
        target = targets.of_row(
            name,
            num_layers,
            wanted,
            exclude=exclude if isinstance(exclude, str) else tuple(exclude),
            layers=layers,
            saved=config.get("modules_to_save") or (),
            kinds=kinds,
        )
        if target is not None:
            selected.update(targets.adapted(name, num_layers, target.layers))
    if config.get("ensure_weight_tying"):
        selected -= {n.module for n in names if n.path == places.HEAD} - used
    if used - selected:
        got = f"tensors of {disk.some(sorted(used - selected))}, which target_modules does not select"
        raise AdapterError(where, got, "tensors of the modules that the config selects")
    if selected - used:
        got = f"no tensors of {disk.some(sorted(selected - used))}, which target_modules selects"
        raise AdapterError(where, got, "tensors of every module that the config selects", "It was not saved whole.")
