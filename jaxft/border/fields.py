"""What a config dataclass says about itself: its fields, their types in words, and the docstring under each.

A field's documentation is the string literal on the lines after it, read from the class's source. A field that is a
*choice* (`peft: {method: lora, rank: 16}`) is declared with `choice`, which names the tag and the alternatives.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A value of a tagged union: the alternative's name (or what its class was loaded from), and its settings."""

    name: str
    value: Any


@dataclass(frozen=True)
class Alternatives:
    """A tagged union: the key that picks, what it can be, and what it is if not written."""

    tag: str
    classes: Mapping[str, type]
    default: str
    doc: str
    """What the tag means."""
    several: bool = False
    """Whether it is a tuple of choices: a list in a file, or a single one written as a mapping."""
    load: Callable[[str], tuple[str, type]] | None = None
    """Finds a class that is none of these, named under the key ``module`` instead of the tag; it comes with the name
    to keep. Raises ValueError."""
    optional: bool = False
    """Whether there may be none, which is then what it is if not written."""


@dataclass(frozen=True)
class Field:
    """One key of a section."""

    name: str
    type: Any
    doc: str
    default: Any
    """`dataclasses.MISSING` if the key must be given."""
    alternatives: Alternatives | None = None

    @property
    def required(self) -> bool:
        """Whether the key must be given."""
        return self.default is dataclasses.MISSING


def choice(
    tag: str,
    classes: Mapping[str, type],
    default: str,
    doc: str,
    several: bool = False,
    load: Callable[[str], tuple[str, type]] | None = None,
    optional: bool = False,
) -> Any:
    """Declares a field of type `Choice`, or `tuple[Choice, ...]` if ``several``; its default is the default
    alternative with that one's defaults, or of several that are ``optional`` none."""
    alternatives = Alternatives(tag, classes, default, doc, several, load, optional)

    def usual() -> Any:
        if optional:
            return ()
        one = Choice(default, classes[default]())
        return (one,) if several else one

    return dataclasses.field(default_factory=usual, metadata={"alternatives": alternatives})


@functools.cache
def fields(cls: type) -> tuple[Field, ...]:
    """The keys of a config dataclass, in order."""
    hints, docs = typing.get_type_hints(cls, include_extras=True), docstrings(cls)
    return tuple(
        Field(f.name, hints[f.name], docs.get(f.name, ""), _default(f), f.metadata.get("alternatives"))
        for f in dataclasses.fields(cls)
        if f.init
    )


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def docstrings(cls: type) -> dict[str, str]:
    """Field name -> the string literal below it in the source of the class (or of a class it inherits from)."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for node, below in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr):
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    docs[node.target.id] = " ".join(below.value.value.split())
    return docs


def options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; a type that is none is its own only member."""
    if typing.get_origin(annotation) is typing.Annotated:
        return options(annotation.__origin__)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def is_section(annotation: Any) -> bool:
    """Whether a type is a config dataclass."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and annotation is not Choice


def named_section(annotation: Any) -> type | None:
    """The config dataclass that the user's own names stand for in a mapping (`dict[str, Source]`); None of others."""
    arguments = typing.get_args(annotation)
    return arguments[1] if typing.get_origin(annotation) is dict and is_section(arguments[1]) else None


_WORDS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false each"),
    type(None): ("null", "nulls"),
    Any: ("anything", "anything"),
}


def words(annotation: Any, several: bool = False) -> str:
    """A type as a user would say it: `int | None` is "an integer or null", `tuple[int, ...]` "a list of integers"."""
    only, *others = options(annotation)
    if others:
        return " or ".join(dict.fromkeys(words(member, several) for member in (only, *others)))
    if only in _WORDS:
        return _WORDS[only][several]
    origin, arguments = typing.get_origin(only), typing.get_args(only)
    lists = "lists" if several else "a list"
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"{lists} of {len(arguments)}: {', '.join(map(words, arguments))}"
    if origin in (tuple, list, Sequence):
        return f"{lists} of {words(arguments[0], several=True)}"
    if origin is dict:
        return f"a mapping of {words(arguments[0])} to {words(arguments[1])}"
    return ("mappings" if several else "a mapping") if is_section(only) else str(only)


def keys(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Field, str]]:
    """Every key below a config dataclass: its path, its field, and of which alternative it is ("" if of none)."""
    for field in fields(cls):
        here = (*path, field.name)
        yield here, field, ""
        for inner in filter(is_section, options(field.type)):
            yield from keys(inner, here)
        if field.alternatives:
            for name, config in field.alternatives.classes.items():
                yield from ((p, f, name) for p, f, _ in keys(config, here))
