"""Methods from outside the package: a class in a file or a module, or one that an installed package offers.

``my_file.py:MyMethod`` and ``my_package.my_module:MyMethod`` name a class; an installed package offers one under a name
by an entry point in the group ``jaxft.methods``. Either is a config that inherits `Targeted`. Naming a file runs it,
and again where it has changed since.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from jaxft.peft.sites import Targeted

GROUP = "jaxft.methods"


def load(spec: str) -> type:
    """The class that ``file.py:Class`` or ``package.module:Class`` names. Raises ValueError."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(f"peft.module: got {spec!r}; expected file.py:Class or package.module:Class")
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Targeted)]
        offered = ", ".join(n for n in known if n != "Targeted") or "no method"
        raise ValueError(f"peft.module: {where} has no {name!r}; it has {offered}")
    return _method(getattr(module, name), spec)


@functools.cache
def installed() -> dict[str, type]:
    """The methods that installed packages offer, by name. Raises ValueError for one that is none."""
    points = importlib.metadata.entry_points(group=GROUP)
    return {point.name: _method(point.load(), f"the entry point {point.name} ({point.value})") for point in points}


def name_of(cls: type) -> str:
    """What `load` finds a class by again: its module, or its file if that is no importable module."""
    module: Any = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    by_file = file is not None and cls.__module__.startswith(_PREFIX)
    return f"{file if by_file else cls.__module__}:{cls.__qualname__}"


_PREFIX = "jaxft_method_"


_read: dict[Path, tuple[bytes, Any]] = {}
"""What each file held when it was last run, and the module that came of it."""


def _file(path: Path) -> Any:
    """The module of a file: run again whenever what is in the file has changed, otherwise the same as before."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"peft.module: no file {path}")
    source = path.read_bytes()
    if path in _read and _read[path][0] == source:
        return _read[path][1]
    name = _PREFIX + "".join(c if c.isalnum() else "_" for c in str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError(f"peft.module: {path} is no Python file")
    module, before = importlib.util.module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module
    try:
        # Not by the loader: it takes compiled code of the same second and length for that of an edited file.
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        sys.modules.update({name: before} if before is not None else {})
        raise
    _read[path] = source, module
    return module


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"peft.module: {error}; expected a file.py:Class, or a module that can be imported") from None


def _method(found: Any, what: str) -> type:
    fine = isinstance(found, type) and issubclass(found, Targeted) and dataclasses.is_dataclass(found)
    if not fine or found.wrap is Targeted.wrap:
        raise ValueError(
            f"peft.module: {what} is no method; expected a frozen dataclass that inherits jaxft.peft.Targeted and has "
            "wrap(site)"
        )
    return found
