"""Methods from outside the package: a class in a file or a module, or one that an installed package offers.

``my_file.py:MyMethod`` and ``my_package.my_module:MyMethod`` name a class; an installed package offers one under a name
by an entry point in the group ``jaxft.methods``. Either is a config that inherits `Targeted`. Naming a file runs it,
and again where it has changed since.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from jaxft.peft.sites import Targeted

GROUP = "jaxft.methods"


def load(spec: str) -> type:
    """The class that ``file.py:Class`` or ``package.module:Class`` names. Raises ValueError."""
    return find(spec)[1]


def find(spec: str) -> tuple[str, type]:
    """What names the class from any folder (a file by its whole path), and the class. Raises ValueError."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(f"peft.module: got {spec!r}; expected file.py:Class or package.module:Class")
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        where, module = str(path), _file(path, name)
    else:
        module = _module(where)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Targeted)]
        offered = ", ".join(n for n in known if n != "Targeted") or "no method"
        raise ValueError(f"peft.module: {where} has no {name!r}; it has {offered}")
    return f"{where}:{name}", _method(getattr(module, name), spec)


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


def _file(path: Path, name: str) -> Any:
    """The module of a file: run again whenever what is in the file has changed, otherwise the same as before.

    Raises ValueError; ``name``: of the class that is looked for."""
    if not path.is_file():
        raise ValueError(
            f"peft.module: no file {path}; expected the Python file that has the class {name}: check the path, put the "
            f"file back there, or say where it is now, peft.module=FILE.py:{name}"
        )
    source = path.read_bytes()
    if path in _read and _read[path][0] == source:
        return _read[path][1]
    made = _PREFIX + "".join(c if c.isalnum() else "_" for c in str(path))
    spec = importlib.util.spec_from_file_location(made, path)
    if spec is None:
        raise ValueError(f"peft.module: {path} is no Python file")
    module, before = importlib.util.module_from_spec(spec), sys.modules.get(made)
    sys.modules[made] = module
    try:
        # Not by the loader: it takes compiled code of the same second and length for that of an edited file.
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[made]
        sys.modules.update({made: before} if before is not None else {})
        if isinstance(error, Exception):
            raise _failed(error, str(path)) from error
        raise
    _read[path] = source, module
    return module


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            expected = "expected a file.py:Class, or a module that can be imported"
            raise ValueError(f"peft.module: {error}; {expected}") from None
        raise _failed(error, name) from error


def _failed(error: Exception, what: str) -> ValueError:
    """The error of a file of the user's own that does not run, at the line where it stopped."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    else:
        lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        own = [line for line in lines if line[0] == what] or [at for at in lines if not at[0].startswith("<frozen")]
        place = f"{own[-1][0]}, line {own[-1][1]}"
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return ValueError(f"peft.module: {what} cannot be imported: {place}: {type(error).__name__}: {said}")


def _method(found: Any, what: str) -> type:
    expected = (
        "expected a frozen dataclass (@dataclass(frozen=True, kw_only=True) above the class) that inherits "
        "jaxft.peft.Targeted and has wrap(site)"
    )
    if not isinstance(found, type) or not issubclass(found, Targeted) or found.wrap is Targeted.wrap:
        raise ValueError(f"peft.module: {what} is no method; {expected}")
    if "__dataclass_fields__" not in vars(found):  # is_dataclass is true of every heir of one
        raise ValueError(
            f"peft.module: {what} is a class without @dataclass, so its settings would not count; {expected}"
        )
    return found
