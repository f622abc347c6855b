"""Plain data as JSON and back: what a program and its tests may tell each other.

Only exact types of the standard library are data, and every value that is read is made anew from its parts: nothing
that a program defines (an `__eq__`, say) comes over. Anything else is handed to ``other``, which may name it.
"""

import base64
import collections
import datetime
import decimal
import fractions
import json
import math
import os
import struct
from collections.abc import Callable
from typing import Any

LARGEST = 16 << 20
"""Bytes of a message."""

_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", collections.deque: "deque"}
_MAPPINGS: dict[type, str] = {
    dict: "dict", collections.OrderedDict: "dict", collections.defaultdict: "dict", collections.Counter: "counter",
}  # fmt: skip
_BYTES: dict[type, str] = {bytes: "bytes", bytearray: "bytearray"}
_BASES: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__}
_TIMES: dict[type, str] = {datetime.date: "date", datetime.datetime: "datetime", datetime.time: "time"}


class Unknown(Exception):
    """A message that cannot be read."""


def pack(value: Any, other: Callable[[Any], Any]) -> Any:
    """What JSON holds of a value. ``other`` says what stands for one that is no plain data; it may raise."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if abs(value) < 1 << 53 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [pack(item, other) for item in value]
    if kind in _SEQUENCES:
        return {_SEQUENCES[kind]: [pack(item, other) for item in value]}
    if kind in _MAPPINGS:
        return {_MAPPINGS[kind]: [[pack(key, other), pack(item, other)] for key, item in value.items()]}
    if kind in _BYTES:
        return {_BYTES[kind]: base64.b64encode(value).decode()}
    if kind is complex:
        return {"complex": [pack(value.real, other), pack(value.imag, other)]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind is decimal.Decimal:
        return {"decimal": str(value)}
    if kind is fractions.Fraction:
        return {"fraction": [hex(value.numerator), hex(value.denominator)]}
    if kind in _TIMES and getattr(value, "tzinfo", None) is None:
        return {_TIMES[kind]: value.isoformat()}
    if kind is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {"named": [kind.__name__, list(kind._fields), [pack(item, other) for item in value]]}
    for base, plain in _BASES.items():  # an IntEnum, say
        if isinstance(value, base):
            return pack(plain(value), other)
    return other(value)


_MADE: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "range": lambda parts: range(*parts),
    "decimal": decimal.Decimal,
    "fraction": lambda parts: fractions.Fraction(int(parts[0], 16), int(parts[1], 16)),
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
}
_FILLED: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque,
    "complex": lambda parts: complex(*parts),
}  # fmt: skip


def unpack(held: Any, other: Callable[[str, Any], Any]) -> Any:
    """The value that `pack` made this of. Raises Unknown.

    ``other``: makes the value of a name (and what is held under it) that is none of plain data; it may raise."""
    if isinstance(held, list):
        return [unpack(item, other) for item in held]
    if not isinstance(held, dict):
        return held
    if len(held) != 1:
        raise Unknown(f"got {len(held)} names for one value")
    ((name, inner),) = held.items()
    try:
        if name in _MADE:
            return _MADE[name](inner)
        if name in _FILLED:
            return _FILLED[name]([unpack(item, other) for item in inner])
        if name in ("dict", "counter"):
            made = {unpack(key, other): unpack(item, other) for key, item in inner}
            return made if name == "dict" else collections.Counter(made)
        if name == "named":
            title, fields, items = inner
            return collections.namedtuple(title, fields)(*[unpack(item, other) for item in items])
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise Unknown(f"{name}: {error}") from None
    return other(name, inner)


def send(channel: int, message: Any) -> None:
    """Writes a message. Raises OSError, and ValueError for one that is too long."""
    data = json.dumps(message).encode()
    if len(data) > LARGEST:
        raise ValueError(f"{len(data)} bytes are too many")
    data = struct.pack("=I", len(data)) + data
    while data:
        data = data[os.write(channel, data) :]


def receive(channel: int) -> Any:
    """Reads a message. Raises EOFError, and Unknown."""
    (length,) = struct.unpack("=I", _read(channel, 4))
    if length > LARGEST:
        raise Unknown(f"{length} bytes are too many")
    try:
        return json.loads(_read(channel, length))
    except (ValueError, RecursionError) as error:
        raise Unknown(str(error)) from None


def _read(channel: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        part = os.read(channel, min(length - len(found), 1 << 20))
        if not part:
            raise EOFError
        found += part
    return bytes(found)
