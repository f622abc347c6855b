"""YAML files and `key=value` overrides as plain values, each with the place it was written at.

Two things differ from PyYAML's `safe_load`. A key written twice is refused, since the first would be lost silently. And
scalars follow YAML 1.2: `1e-4` is a number (PyYAML reads text), `no` and `on` are text, and nothing becomes a date.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from jaxft.border.errors import ConfigError

KeyPath = tuple[str | int, ...]
TYPED = "command line"
"""The place of what is no file's."""

_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"
_RESOLVERS = (
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_MERGE, r"<<", "<"),
)


class Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back: text that looks like a number is quoted."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


for _class in (Loader, Dumper):
    for _tag, _pattern, _first in _RESOLVERS:
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def _decimal(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 16 if text.startswith("0x") else 10)  # YAML 1.1 reads 010 as eight


Loader.add_constructor(_INT, _decimal)


@dataclass(frozen=True)
class Typed:
    """A value from the command line: as YAML, and as typed, for keys that want text (`model.path=123`)."""

    value: Any
    text: str
    before: Any = None
    """What the file has there."""


@dataclass
class Source:
    """Plain nested values (dict, list, scalars, `Typed`) and where each was written."""

    values: Any = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def typed(self, path: KeyPath) -> bool:
        """Whether the value at `path`, or part of it, is from the command line."""
        return self.place(path) == TYPED or any(
            place == TYPED for known, place in self.places.items() if known[: len(path)] == path
        )

    def place(self, path: KeyPath) -> str:
        """Where the value at `path`, or what encloses it, was written; empty if nowhere."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return ""


def read(file: Path | str | None, overrides: Sequence[str] = ()) -> Source:
    """The values of a YAML file (none: an empty one) with `key=value` overrides laid over them; the last one wins."""
    return over(Source() if file is None else _read_file(Path(file)), overrides)


def over(source: Source, overrides: Sequence[str]) -> Source:
    """``source`` with `key=value` overrides laid over it; the last one wins."""
    for override in overrides:
        _lay_over(source, override)
    return source


def _read_file(path: Path) -> Source:
    try:
        return read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None


def read_yaml(text: str, name: str) -> Source:
    """The values of a YAML text; `name` is what messages call it. Raises ConfigError naming the line."""
    places: dict[KeyPath, str] = {}
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        values = {} if node is None else _values(loader, node, (), name, places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected `key: value` lines, got {type(values).__name__}")
    return Source(values, places)


def _values(loader: Loader, node: yaml.Node, path: KeyPath, name: str, places: dict[KeyPath, str]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_values(loader, item, (*path, i), name, places) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    _refuse_duplicates(node, path, name)
    loader.flatten_mapping(node)  # `<<: *anchor`
    values = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        places[*path, key] = f"{name}, line {key_node.start_mark.line + 1}"
        values[key] = _values(loader, value_node, (*path, key), name, places)
    return values


def _refuse_duplicates(node: yaml.MappingNode, path: KeyPath, name: str) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{name}, line {line}: a key must be a word")
        if key_node.tag != _MERGE and key_node.value in seen:
            key = dotted((*path, key_node.value))
            raise ConfigError(f"{name}, line {line}: `{key}` is written twice; first on line {seen[key_node.value]}")
        seen[key_node.value] = line


def _lay_over(source: Source, override: str) -> None:
    key, equals, text = override.partition("=")
    path = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
    if not equals or "" in path:
        raise ConfigError(f"command line: expected key=value (such as optim.lr=1e-4), got {override!r}")
    if not text.strip():
        raise ConfigError(
            f"command line: `{key}` has no value; write {key}=null for none or {key}='\"\"' for empty text"
        )
    try:
        value = read_yaml(f"_: {text}", "command line").values["_"]
    except ConfigError:
        value = text  # not YAML: plain text with a colon or a bracket in it
    for known in [known for known in source.places if known[: len(path)] == path]:
        del source.places[known]
    source.places[path] = TYPED
    _set(source.values, path, Typed(value, text))


def _set(here: Any, path: KeyPath, value: Typed, depth: int = 0) -> None:
    key = _key(here, path[depth], path, depth)
    if depth == len(path) - 1:
        before = here.get(key) if isinstance(here, dict) else here[key]
        here[key] = replace(value, before=before.before if isinstance(before, Typed) else before)
        return
    below = here.get(key) if isinstance(here, dict) else here[key]
    below = below.value if isinstance(below, Typed) else below
    if not isinstance(below, dict | list | None):
        parent = dotted(path[: depth + 1])
        raise ConfigError(
            f"command line: `{dotted(path)}`: `{parent}` is {below!r}, which has no keys; write it as a mapping"
        )
    here[key] = {} if below is None else below
    _set(here[key], path, value, depth + 1)


def _key(here: Any, part: str | int, path: KeyPath, depth: int) -> str | int:
    """The next step of an override's path: an index where a list stands, else a key."""
    if not isinstance(here, list):
        return str(part)
    if isinstance(part, int) and part < len(here):
        return part
    parent = dotted(path[:depth])
    raise ConfigError(
        f"command line: `{dotted(path)}`: `{parent}` is a list of {len(here)}; give an index below that, "
        f"or the whole list as {parent}=[...]"
    )


def dotted(path: KeyPath) -> str:
    """`("data", "sources", 0, "path")` as a user writes it: data.sources.0.path."""
    return ".".join(map(str, path))
