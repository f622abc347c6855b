"""Adapters in jaxft's own format, for what peft's has no word for: a directory like peft's, ``peft_type`` JAXFT.

The config describes each place of the tree that differs from the base as it is: the classes of the wrappers, their
static fields, the shape and dtype of each array; the tensors bear our paths. So any composition is held bitwise, of
methods that did not exist when this was written too, and reading runs no method again: nothing is drawn, decomposed or
calibrated. A class is looked up among those that are loaded, never imported by a name from a file.

A description is ``null``, an array's "float32[3,16]", ``{"base": shape}`` for what the model itself has there,
``{"trained": "float32[16]"}`` for an array of the model that a pattern trained, a list, or a mapping of ``class`` (or
``dict``) to what is in it.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.weight import PARAMETER, STATIC, Shared, Split, Transposed, Weight, role
from jaxft.peft import METHODS, disk, registry
from jaxft.peft.disk import AdapterError, Tensors

PEFT_TYPE, VERSION = "JAXFT", 1
README = """---
base_model: {base}
library_name: jaxft
---

An adapter made with jaxft, in its own format (peft's has no word for all of it). Load it with

    jaxft.load_adapter(jaxft.load(base), "this directory")

or fold it into its base model: `jaxft merge "this directory" --out merged`.
"""


def export(where: object, params: tree.Params, trained: set[str], methods: Sequence[Any]) -> tuple[dict, Tensors]:
    """Config fields and tensors of all that ``params`` hold besides the base.

    ``trained``: paths of the model's own arrays that are no longer what they were; ``methods``: the configs, told
    for the reader. Raises AdapterError for a field that cannot be written down."""
    leaves, tensors = describe(where, params, trained)
    if not leaves:
        remedy = "Save weights trained whole with jaxft.save_hf(model, jaxft.merge(params), directory)."
        raise AdapterError(where, "parameters without an adapter", "an adapter", remedy)
    config = {"peft_type": PEFT_TYPE, "format": VERSION, "methods": [_method(m) for m in methods], "leaves": leaves}
    return config, {f"/{path}": _storable(disk.host(array)) for path, array in tensors.items()}


def _storable(array: np.ndarray) -> np.ndarray:
    """The array; floats of eight bits, which numpy's own safetensors cannot read, as their bytes."""
    return array.view(np.uint8) if array.dtype.itemsize == 1 and jnp.issubdtype(array.dtype, jnp.floating) else array


def describe(
    where: object, params: tree.Params, trained: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description of each place that differs from the base, and the arrays to store, by path: see `export`."""
    tensors: dict[str, Any] = {}
    writer = _Writer(where, trained, tensors)
    found = {path: writer.describe(path, w, False) for path, w in tree.paths(params, inside=False)}
    return {path: described for path, described in found.items() if not _is_base(described)}, tensors


def changed(params: tree.Params, base: tree.Params) -> set[str]:
    """Paths of the model's own arrays in ``params`` that are not those of ``base``."""
    before = dict(tree.paths(base, inside=False))
    return {found for path, w in tree.paths(params, inside=False) for found in _changed(path, w, before.get(path))}


def _changed(path: str, value: Any, base: Any) -> Iterator[str]:
    if isinstance(value, Weight):
        for f in dataclasses.fields(value):  # type: ignore[arg-type]
            if role(f) == PARAMETER or (role(f) != STATIC and not value.adapter):
                yield from _changed(f"{path}/{f.name}", getattr(value, f.name), _inside(base, type(value), f.name))
    elif value is not base:
        same = base is not None and value.shape == base.shape
        if not same or not bool(jnp.array_equal(*(tree.stack_layers(a) for a in (value, base)))):
            yield path


def _inside(base: Any, cls: type, field: str) -> Any:
    """What the model has where a ``cls`` has ``field``, given what it has at the place of the whole."""
    return getattr(base, field) if type(base) is cls and not cls.adapter else base


def _method(config: Any) -> dict[str, Any]:
    """A method's config: for its reader, and for the error where its class is not loaded."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    keys = [{"method": key} for key, row in METHODS.items() if type(config) is row.config]
    return json.loads(json.dumps({**(keys or [{"module": registry.name_of(type(config))}])[0], **fields}, default=str))


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _is_base(described: Any) -> bool:
    return described is None or (isinstance(described, dict) and "base" in described)


def _array(a: Any) -> str:
    return f"{jnp.dtype(a.dtype).name}[{','.join(map(str, a.shape))}]"


@dataclasses.dataclass(frozen=True)
class _Writer:
    where: object
    trained: Collection[str]
    tensors: dict[str, Any]
    shared: dict[Any, str] = dataclasses.field(default_factory=dict)
    """Contents of the arrays in common: the path that each was first found at."""

    def describe(self, path: str, value: Any, own: bool) -> Any:
        """The description of one value; ``own``: whether it belongs to an adapter rather than to the model."""
        if isinstance(value, Weight):
            return self._weight(path, value, own)
        if isinstance(value, Split) and value.whole:
            return self._leaf(path, value, own)
        if isinstance(value, Split):
            return {"class": "Split", "parts": self._each(path, value.parts, own)}
        if isinstance(value, Shared):
            return self._shared(path, value)
        if isinstance(value, dict):
            return {"dict": {name: self.describe(f"{path}/{name}", part, own) for name, part in value.items()}}
        if type(value) in (list, tuple):
            return {"class": type(value).__name__, "parts": self._each(path, value, own)}
        if value is None:
            return None
        if isinstance(value, jax.Array | np.ndarray | np.generic) and not jnp.issubdtype(
            value.dtype, jax.dtypes.prng_key
        ):
            return self._leaf(path, value, own)
        raise AdapterError(f"{self.where}: {path}", f"a {type(value).__name__}", "arrays in mappings, lists or Weights")

    def _shared(self, path: str, value: Shared) -> Any:
        """An array that layers have in common, and often all weights: it is stored once."""
        array = disk.host(value.value)
        first = self.shared.setdefault((_array(array), hashlib.sha256(array.tobytes()).digest()), path)
        if first == path:
            self.tensors[path] = array
        return {"class": "Shared", "at": first, "array": _array(array)}

    def _each(self, path: str, parts: Sequence[Any], own: bool) -> list[Any]:
        return [self.describe(f"{path}/{i}", part, own) for i, part in enumerate(parts)]

    def _leaf(self, path: str, value: Any, own: bool) -> Any:
        if not own and path not in self.trained:
            return {"base": list(value.shape)}
        self.tensors[path] = np.stack([disk.host(p) for p in value.parts]) if isinstance(value, Split) else value
        return _array(value) if own else {"trained": _array(value)}

    def _weight(self, path: str, w: Weight, own: bool) -> Any:
        fields, static = {}, {}
        for f in dataclasses.fields(w):  # type: ignore[arg-type]
            value = getattr(w, f.name)
            if role(f) == STATIC:
                static[f.name] = self._static(f"{path}/{f.name}", value)
            else:
                fields[f.name] = self.describe(f"{path}/{f.name}", value, own or (w.adapter and role(f) != PARAMETER))
        models = not own and not w.adapter and not isinstance(w, Transposed)  # which only stands in for a tied head
        if models and all(_is_base(described) for described in fields.values()):
            return {"base": list(w.shape)}
        return {"class": _name(type(w)), **({"static": static} if static else {}), "fields": fields}

    def _static(self, path: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [self._static(path, part) for part in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        remedy = "A file cannot hold it: keep its name there, and look it up by that name where it is used."
        expected = "static fields of numbers, texts and tuples of them"
        raise AdapterError(f"{self.where}: {path}", f"a {type(value).__name__}", expected, remedy)


def restore(where: Path, config: dict[str, Any], tensors: Tensors, params: tree.Params) -> tree.Params:
    """The parameters with the adapter on them; what is used is taken out of ``tensors``.

    Raises AdapterError naming a class that is not loaded, an array that is missing or of another shape, and a weight
    that the model lacks or has in another shape."""
    file = where / disk.CONFIG
    if config.get("format") != VERSION:
        raise AdapterError(f"{file}: format", repr(config.get("format")), str(VERSION), "Read it with a newer jaxft.")
    if not isinstance(config.get("leaves"), dict):
        raise AdapterError(f"{file}: leaves", repr(config.get("leaves")), "a mapping of paths", "The file is damaged.")
    reader = _Reader(where, tensors, config.get("methods") or [])
    for path, described in config["leaves"].items():
        folder, _, last = path.rpartition("/")
        try:
            here = tree.get(params, folder) if folder else params
        except KeyError:
            raise AdapterError(where, f"an adapter of {path}", "weights that the model has", _OTHER_MODEL) from None
        params = tree.replace(params, path, reader.build(path, described, here.get(last)))
    return params


_OTHER_MODEL = "The adapter was made for another model."


@dataclasses.dataclass(frozen=True)
class _Reader:
    where: Path
    tensors: Tensors
    methods: list[dict[str, Any]]
    shared: dict[str, Shared] = dataclasses.field(default_factory=dict)

    def build(self, path: str, described: Any, base: Any) -> Any:
        """What ``described`` stands for; ``base``: what the model has at this place."""
        if described is None:
            return None
        if isinstance(described, str):
            return self._take(path, described)
        if "base" in described or "trained" in described:
            return self._own(path, described, base)
        if "dict" in described:
            return {name: self.build(f"{path}/{name}", part, base) for name, part in described["dict"].items()}
        name = described["class"]
        if name in _PARTS:
            return _PARTS[name]([self.build(f"{path}/{i}", part, base) for i, part in enumerate(described["parts"])])
        if name == "Shared":
            return self._shared(described["at"], described["array"])
        return self._weight(path, described, base)

    def _shared(self, path: str, text: str) -> Shared:
        if path not in self.shared:
            self.shared[path] = Shared(self._take(path, text))
        return self.shared[path]

    def _own(self, path: str, described: dict[str, Any], base: Any) -> Any:
        """An array of the model itself, or what a pattern made of it."""
        text = described.get("trained")
        shape = described["base"] if text is None else json.loads(text[text.index("[") :])
        if base is None or list(base.shape) != shape:
            got = "nothing" if base is None else f"shape {list(base.shape)}"
            raise AdapterError(f"{self.where}: {path}", f"a model with {got} there", str(shape), _OTHER_MODEL)
        return base if text is None else self._take(path, text)

    def _take(self, path: str, text: str) -> jax.Array:
        array, kind = self.tensors.pop(f"/{path}", None), text.partition("[")[0]
        if array is not None and kind.startswith("float8") and array.dtype == np.uint8:
            array = array.view(jnp.dtype(kind))
        if array is None or _array(array) != text:
            got = f"no tensor {path}" if array is None else f"{path} as {_array(array)}"
            raise AdapterError(self.where, got, text, "It was not saved whole, or changed since.")
        return jnp.asarray(array)

    def _weight(self, path: str, described: dict[str, Any], base: Any) -> Any:
        cls = self._class(path, described["class"])
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = [name for part in ("static", "fields") for name in described.get(part, ()) if name not in known]
        if unknown:
            got = f"fields {', '.join(unknown)}, which {described['class']} does not have"
            raise AdapterError(f"{self.where}: {path}", got, "the class that was saved", "It has changed since.")
        made = {name: _tuples(value) for name, value in described.get("static", {}).items()}
        for name, part in described["fields"].items():
            made[name] = self.build(f"{path}/{name}", part, _inside(base, cls, name))
        return cls(**made)

    def _class(self, path: str, name: str) -> type:
        """The loaded class of that name, or the only one of its name that has moved to another module."""
        loaded = dict[str, type]()
        for cls in _subclasses(Weight):
            if not _is_current(loaded.get(_name(cls))):
                loaded[_name(cls)] = cls
        moved = [cls for full, cls in loaded.items() if full.partition(":")[2] == name.partition(":")[2]]
        if name not in loaded and len(moved) != 1:
            modules = {m["module"] for m in self.methods if "module" in m} or {name}
            remedy = f"Import {' and '.join(sorted(modules))} first (on the command line: peft.module=...)."
            raise AdapterError(f"{self.where}: {path}", f"a {name}", "a class that is loaded", remedy)
        return loaded[name] if name in loaded else moved[0]


_PARTS = {"Split": Split, "list": list, "tuple": tuple}


def _subclasses(cls: type) -> list[type]:
    """The class and all below it that are loaded, of each parent the older ones first."""
    return [cls, *(found for below in cls.__subclasses__() for found in _subclasses(below))]


def _is_current(cls: type | None) -> bool:
    """Whether a class is what its module has under its name: not so once a file or a notebook's cell has run again."""
    return cls is not None and getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
