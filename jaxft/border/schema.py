"""A JSON schema of a config dataclass, for editors: completion, types and the meaning of each key under the cursor."""

import functools
from typing import Any

import pydantic

from jaxft.border import check
from jaxft.border import fields as fields_
from jaxft.border.fields import Alternatives, Field


def schema(cls: type, title: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config dataclass."""
    several = [f.alternatives for f in fields_.fields(cls) if f.alternatives and f.alternatives.several]
    shared = {"$defs": {one.tag: _alternatives(one) for one in several}} if several else {}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **_section(cls), **shared}


def _section(cls: type) -> dict[str, Any]:
    # A section that must be given is still optional where everything in it has a default; the checker is exact.
    fields = fields_.fields(cls)
    required = [field.name for field in fields if field.required and not fields_.is_section(field.type)]
    described = {
        "type": "object",
        "additionalProperties": False,
        "properties": {field.name: _field(field) for field in fields},
    }
    return {**described, "required": required} if required else described


def _field(field: Field) -> dict[str, Any]:
    described = _choices(field.alternatives) if field.alternatives else _type(field.type)
    described = {**described, "description": field.doc} if field.doc else described
    if field.required or field.alternatives or fields_.is_section(field.type):
        return described
    return {**described, "default": check.plain(field.default)}


def _choices(alternatives: Alternatives) -> dict[str, Any]:
    """One alternative, or where there may be several (a field of the root) a list of them too."""
    if not alternatives.several:
        return _alternatives(alternatives)
    one = {"$ref": f"#/$defs/{alternatives.tag}"}
    return {"anyOf": [one, {"type": "array", "minItems": 0 if alternatives.optional else 1, "items": one}]}


def _alternatives(alternatives: Alternatives) -> dict[str, Any]:
    """One object per alternative, told apart by the tag; only the default's may leave it out. Or a bare name."""
    variants = []
    for name, cls in alternatives.classes.items():
        section = _section(cls)
        section["properties"] = {
            alternatives.tag: {"const": name, "description": alternatives.doc},
            **section["properties"],
        }
        tag = [] if name == alternatives.default else [alternatives.tag]
        section["required"] = [*tag, *section.get("required", [])]
        variants.append({"title": name, **section})
    if alternatives.load is not None:
        own = {"type": "string", "description": "Where its class is: file.py:Class or package.module:Class."}
        variants.append({"title": "one's own", "type": "object", "properties": {"module": own}, "required": ["module"]})
    return {"oneOf": [*variants, {"enum": list(alternatives.classes)}]}


def _type(annotation: Any) -> dict[str, Any]:
    members = fields_.options(annotation)
    if fields_.is_section(members[0]) and len(members) == 1:
        # A section written with nothing below it means its defaults.
        return {**_section(members[0]), "type": ["object", "null"]}
    if any(fields_.is_section(member) for member in members):
        return {"anyOf": [_section(m) if fields_.is_section(m) else _leaf(m) for m in members]}
    if (named := fields_.named_section(annotation)) is not None:
        return {"type": "object", "additionalProperties": _section(named)}
    return _leaf(annotation)


@functools.cache
def _adapter_schema(annotation: Any) -> dict[str, Any]:
    return pydantic.TypeAdapter(annotation).json_schema()


def _leaf(annotation: Any) -> dict[str, Any]:
    return dict(_adapter_schema(annotation))
