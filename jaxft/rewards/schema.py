"""JSON schemas (draft 2020-12): by the package jsonschema where it is installed, or else a part of the standard, which
refuses every keyword that it does not know rather than to pass it over.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

Validator = Callable[[Any], bool]

_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: _number(v) and (isinstance(v, int) or v.is_integer()),
    "number": lambda v: _number(v),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
_REMARKS = ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly")
_REMARKS += ("writeOnly",)
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda v, bound: not _number(v) or v >= bound,
    "maximum": lambda v, bound: not _number(v) or v <= bound,
    "exclusiveMinimum": lambda v, bound: not _number(v) or v > bound,
    "exclusiveMaximum": lambda v, bound: not _number(v) or v < bound,
    "multipleOf": lambda v, unit: not _number(v) or (Fraction(str(v)) / Fraction(str(unit))).denominator == 1,
    "minLength": lambda v, bound: not isinstance(v, str) or len(v) >= bound,
    "maxLength": lambda v, bound: not isinstance(v, str) or len(v) <= bound,
    "minItems": lambda v, bound: not isinstance(v, list) or len(v) >= bound,
    "maxItems": lambda v, bound: not isinstance(v, list) or len(v) <= bound,
    "minProperties": lambda v, bound: not isinstance(v, dict) or len(v) >= bound,
    "maxProperties": lambda v, bound: not isinstance(v, dict) or len(v) <= bound,
}
_PARTS = ("type", "enum", "const", "pattern", "required", "uniqueItems", "properties", "additionalProperties", "items")
_PARTS += ("prefixItems", "anyOf", "oneOf", "allOf", "not")


def read(value: Any, where: str) -> Any:
    """A schema that may be text. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"schema: {where} is no JSON ({error})") from None


def validator(schema: Any) -> Validator:
    """Whether a value is allowed. Raises ValueError for what is no schema, or is not understood."""
    if importlib.util.find_spec("jsonschema") is None:
        return part(schema)
    import jsonschema

    made: Any = jsonschema.Draft202012Validator
    try:
        made.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"schema: got {error.instance!r} at {error.json_path}: {error.message}") from None
    return made(schema).is_valid


def part(schema: Any, where: str = "schema") -> Validator:
    """`validator` without the package. Raises ValueError; ``where``: the schema's own place, for messages."""
    if isinstance(schema, bool):
        return lambda value: schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where}: got {schema!r}; expected a mapping, true or false")
    if unknown := [key for key in schema if key not in (*_BOUNDS, *_PARTS, *_REMARKS)]:
        raise ValueError(
            f"{where}: got the keyword {unknown[0]!r}; without the package jsonschema these are known: "
            f"{', '.join([*_PARTS, *_BOUNDS])}. pip install jsonschema for all"
        )
    checks = [_bound(schema, key, where) for key in _BOUNDS if key in schema]
    makers = (_type, _values, _text, _object, _array, _several)
    checks += [check for maker in makers for check in maker(schema, where)]
    return lambda value: all(check(value) for check in checks)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bound(schema: Mapping[str, Any], key: str, where: str) -> Validator:
    bound, counts = schema[key], key.startswith(("min", "max")) and key not in ("minimum", "maximum")
    if not _number(bound) or (counts and (bound < 0 or bound != int(bound))) or (key == "multipleOf" and bound <= 0):
        raise ValueError(f"{where}/{key}: got {bound!r}; expected {'a count' if counts else 'a number'}")
    return lambda value: _BOUNDS[key](value, bound)


def _type(schema: Mapping[str, Any], where: str) -> list[Validator]:
    if "type" not in schema:
        return []
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
        raise ValueError(f"{where}/type: got {schema['type']!r}; expected one of {', '.join(_TYPES)}, or a list")
    return [lambda value: any(_TYPES[name](value) for name in names)]


def _values(schema: Mapping[str, Any], where: str) -> list[Validator]:
    allowed = [schema["const"]] if "const" in schema else None
    checks: list[Validator] = [] if allowed is None else [lambda value: _same(value, allowed[0])]
    if "enum" in schema:
        listed = schema["enum"]
        if not isinstance(listed, list):
            raise ValueError(f"{where}/enum: got {listed!r}; expected a list")
        checks.append(lambda value: any(_same(value, other) for other in listed))
    return checks


def _text(schema: Mapping[str, Any], where: str) -> list[Validator]:
    if "pattern" not in schema:
        return []
    try:
        found = re.compile(schema["pattern"]).search
    except (re.error, TypeError) as error:
        raise ValueError(f"{where}/pattern: got {schema['pattern']!r}, which is no regex ({error})") from None
    return [lambda value: not isinstance(value, str) or found(value) is not None]


def _object(schema: Mapping[str, Any], where: str) -> list[Validator]:
    given, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}/properties: got {given!r}; expected a mapping")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{where}/required: got {required!r}; expected a list of names")
    known = {name: part(inner, f"{where}/properties/{name}") for name, inner in given.items()}
    others = part(schema.get("additionalProperties", True), f"{where}/additionalProperties")

    def check(value: Any) -> bool:
        if not isinstance(value, dict):
            return True
        there = all(name in value for name in required)
        return there and all(known.get(name, others)(inner) for name, inner in value.items())

    return [check]


def _array(schema: Mapping[str, Any], where: str) -> list[Validator]:
    first, unique = schema.get("prefixItems", []), schema.get("uniqueItems", False)
    if not isinstance(first, list):
        raise ValueError(f"{where}/prefixItems: got {first!r}; expected a list")
    if not isinstance(unique, bool):
        raise ValueError(f"{where}/uniqueItems: got {unique!r}; expected true or false")
    heads = [part(inner, f"{where}/prefixItems/{i}") for i, inner in enumerate(first)]
    rest = part(schema.get("items", True), f"{where}/items")

    def check(value: Any) -> bool:
        if not isinstance(value, list):
            return True
        fine = all((heads[i] if i < len(heads) else rest)(item) for i, item in enumerate(value))
        return fine and not (unique and any(_same(a, b) for i, a in enumerate(value) for b in value[:i]))

    return [check]


def _several(schema: Mapping[str, Any], where: str) -> list[Validator]:
    checks: list[Validator] = []
    counted = {"anyOf": lambda n, total: n > 0, "oneOf": lambda n, total: n == 1, "allOf": lambda n, total: n == total}
    for key, enough in counted.items():
        if key not in schema:
            continue
        if not isinstance(schema[key], list) or not schema[key]:
            raise ValueError(f"{where}/{key}: got {schema[key]!r}; expected a list of schemas")
        made = [part(inner, f"{where}/{key}/{i}") for i, inner in enumerate(schema[key])]
        checks.append(lambda v, made=made, enough=enough: enough(sum(allows(v) for allows in made), len(made)))
    if "not" in schema:
        refused = part(schema["not"], f"{where}/not")
        checks.append(lambda value: not refused(value))
    return checks


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON, in which 1 is 1.0 and neither is true."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if _number(a) and _number(b):
        return a == b
    return type(a) is type(b) and a == b
