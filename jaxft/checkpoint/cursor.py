"""A cursor's arrays apart from the rest of it: on-policy data are no function of a number, and what is left of them is
saved with the state, as arrays.

In the JSON an array is ``{"array": name}``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

ARRAY = "array"


def parted(cursor: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The cursor with names for its arrays, as JSON, and the arrays by name."""
    arrays: dict[str, np.ndarray] = {}

    def part(value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray):
            arrays[path] = value
            return {ARRAY: path}
        if isinstance(value, Mapping):
            return {key: part(each, f"{path}.{key}" if path else key) for key, each in value.items()}
        return value

    return part(cursor, ""), arrays


def joined(cursor: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `parted`."""
    if not isinstance(cursor, Mapping):
        return cursor
    if cursor.keys() == {ARRAY} and cursor[ARRAY] in arrays:
        return np.asarray(arrays[cursor[ARRAY]])
    return {key: joined(value, arrays) for key, value in cursor.items()}


def shown(cursor: Any) -> Any:
    """The cursor for a message: without arrays."""
    if not isinstance(cursor, Mapping):
        return cursor
    return {key: shown(value) for key, value in cursor.items() if not isinstance(value, np.ndarray)}
