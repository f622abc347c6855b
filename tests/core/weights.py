"""The table of every Weight there is: a new one enters the conformance tests by a row in a module of `tests.core.rows`.

A method that wraps linear layers has a row with its defaults unasked; its module adds the settings that matter.
"""

import dataclasses
import importlib
import pkgutil

from jaxft import peft
from jaxft.testing.subject import Row, adapted, matrix
from tests.core import rows


def _rows() -> dict[str, Row]:
    modules = [importlib.import_module(f"{rows.__name__}.{m.name}") for m in pkgutil.iter_modules(rows.__path__)]
    found = {name: row for module in modules for name, row in getattr(module, "ROWS", {}).items()}
    for name, method in peft.METHODS.items():
        if issubclass(method.config, peft.Targeted) and name not in found:
            found[name] = Row(adapted(matrix, dataclasses.replace(method.config(), targets=("w",))))
    return found


ROWS = _rows()
