"""Plain values to frozen dataclasses, refusing what is not understood.

Every problem is collected before raising, so one run tells all of them. Values are strict: "3" is not an integer and 3
is not text in a file, an integer is a fine number, and a list stands for a tuple. On the command line, where the shell
has eaten the quotes, a key that wants text takes what was typed.
"""

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import pydantic

from jaxft.border import fields as fields_
from jaxft.border import reading
from jaxft.border.errors import ConfigError
from jaxft.border.fields import Alternatives, Choice, Field
from jaxft.border.reading import KeyPath, Source, Typed, dotted

T = TypeVar("T")
MODULE = "module"
"""The key that names a class from outside, in place of a choice's tag."""

_INVALID: Any = object()  # a value that could not be built; its problem is already noted


def build(cls: type[T], source: Source, tell: Callable[[str], None] = lambda line: None) -> T:
    """The dataclass that `source` describes. Raises ConfigError with one line per problem.

    ``tell`` is given a line for what the command line has made meaningless in the file."""
    checker = _Checker(cls, source, tell)
    built = checker.section(cls, source.values, ())
    if checker.problems:
        raise ConfigError("\n".join(checker.problems))
    return built


@functools.cache
def _adapter(annotation: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(annotation, config=pydantic.ConfigDict(allow_inf_nan=False))


class _Checker:
    """One pass over one source, noting problems."""

    def __init__(self, root: type, source: Source, tell: Callable[[str], None]) -> None:
        self.root, self.source, self.tell, self.problems = root, source, tell, list[str]()

    def note(self, path: KeyPath, message: str) -> Any:
        place = self.source.place(path)
        self.problems.append(f"{place}: {message}" if place else message)
        return _INVALID

    def section(self, cls: type, values: Any, path: KeyPath, picked: str = "") -> Any:
        """An instance of `cls`; nothing written (null) means its defaults."""
        values = _opened(values)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            return self.note(
                path, f"`{dotted(path)}`: expected a mapping (its keys: {_names(cls)}), got {show(values)}"
            )
        known = {field.name: field for field in fields_.fields(cls)}
        for key in values:
            if key not in known:
                message = self.unknown(cls, path, str(key), picked)
                if values[key] is None and self.source.place((*path, key)) == reading.TYPED:
                    message += "; inside {...} a text with a comma or a colon is put in quotes"
                self.note((*path, key), message)
        built = {
            name: self.value(field, values[name], (*path, name))
            if name in values
            else self.absent(field, (*path, name))
            for name, field in known.items()
        }
        if any(value is _INVALID for value in built.values()):
            return _INVALID
        try:
            return cls(**built)
        except ValueError as error:
            return self.refused(path, str(error))

    def refused(self, path: KeyPath, message: str) -> Any:
        """Notes what a dataclass said of its own values, at the line of the key that its message begins with."""
        section = dotted(path)
        told = message.split(":")[0].strip("` ")
        if path and not told.startswith(section):
            return self.note(path, f"`{section}`: {message}")
        return self.note(tuple(told.split(".")), message)

    def absent(self, field: Field, path: KeyPath) -> Any:
        if field.required and len(sections := [s for s in fields_.options(field.type) if fields_.is_section(s)]) == 1:
            return self.section(sections[0], {}, path)
        if field.required:
            key = dotted(path)
            return self.note(path, f"`{key}` must be given ({fields_.words(field.type)}): {field.doc}")
        return field.default

    def value(self, field: Field, value: Any, path: KeyPath) -> Any:
        if field.alternatives and field.alternatives.several:
            return self.choices(field.alternatives, value, path)
        if field.alternatives:
            return self.choice(field.alternatives, value, path)
        return self.typed(field.type, value, path)

    def typed(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """A value of any annotation: dataclasses, and lists mappings of them, are walked; pydantic does the rest."""
        members = fields_.options(annotation)
        plain = _opened(value)
        if plain is None and type(None) in members:
            return None
        for member in members:
            origin, arguments = typing.get_origin(member), typing.get_args(member)
            if fields_.is_section(member) and (isinstance(plain, dict | None) or len(members) == 1):
                return self.section(member, plain, path)
            if origin in (tuple, list) and fields_.is_section(arguments[0]) and isinstance(plain, list):
                built = [self.section(arguments[0], item, (*path, i)) for i, item in enumerate(plain)]
                return _INVALID if _INVALID in built else tuple(built)
            if origin is dict and fields_.is_section(arguments[1]) and isinstance(plain, dict):
                named = {key: self.section(arguments[1], item, (*path, key)) for key, item in plain.items()}
                return _INVALID if _INVALID in named.values() else named
        return self.leaf(annotation, value, path)

    def leaf(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        attempts = [value.value, value.text] if isinstance(value, Typed) else [value]
        problem = ""
        for attempt in attempts:
            try:
                return _adapter(annotation).validate_json(json.dumps(_stripped(attempt)), strict=True)
            except pydantic.ValidationError as error:
                problem = problem or _constraint(error)
        message = f"`{dotted(path)}`: expected {fields_.words(annotation)}, got {show(attempts[0])}"
        return self.note(path, message + problem + _remedy(annotation, attempts[0]))

    def choices(self, alternatives: Alternatives, value: Any, path: KeyPath) -> Any:
        """A list of choices, or a single one without the list."""
        items = _opened(value)
        if alternatives.optional and items in (None, []):
            return ()
        if not isinstance(items, list):
            single = self.choice(alternatives, value, path)
            return _INVALID if single is _INVALID else (single,)
        if not items:
            return self.note(path, f"`{dotted(path)}`: got an empty list; expected at least one {alternatives.tag}")
        built = [self.choice(alternatives, item, (*path, i)) for i, item in enumerate(items)]
        return _INVALID if any(item is _INVALID for item in built) else tuple(built)

    def choice(self, alternatives: Alternatives, value: Any, path: KeyPath) -> Any:
        """`{tag: name, key: ...}`, or just the name where its defaults will do (`peft=lora`)."""
        value = _opened(value)
        if isinstance(value, str):
            value = {alternatives.tag: value}
        instead = ""
        if isinstance(value, dict):
            value, instead = _other_choice(alternatives, value)
        if isinstance(value, dict) and alternatives.load is not None and MODULE in value:
            return self.loaded(alternatives, alternatives.load, value, path, instead)
        if not isinstance(value, dict):
            names = ", ".join(alternatives.classes)
            return self.note(
                path, f"`{dotted(path)}`: expected {alternatives.tag} (one of {names}) and its keys, got {show(value)}"
            )
        name = _opened(value.get(alternatives.tag, alternatives.default))
        if name not in alternatives.classes:
            here = (*path, alternatives.tag)
            return self.note(
                here,
                f"`{dotted(here)}`: expected one of {', '.join(alternatives.classes)}; got {show(name)}"
                + _meant(difflib.get_close_matches(str(name), alternatives.classes, 1, 0.5)),
            )
        cls, picked = alternatives.classes[name], f"{dotted((*path, alternatives.tag))}={name}"
        rest = {key: item for key, item in value.items() if key != alternatives.tag}
        config = self.section(cls, self.kept(cls, rest, path, picked, instead), path, picked)
        return _INVALID if config is _INVALID else Choice(name, config)

    def loaded(
        self,
        alternatives: Alternatives,
        load: Callable[[str], tuple[str, type]],
        value: dict,
        path: KeyPath,
        instead: str,
    ) -> Any:
        """A choice whose class is named instead of being one of the alternatives; ``instead``: of what (see `kept`)."""
        spec, here = _opened(value[MODULE]), (*path, MODULE)
        if alternatives.tag in value:
            return self.note(here, f"`{dotted(here)}`: got `{alternatives.tag}` as well; expected one of the two")
        try:
            spec, cls = load(str(spec))
        except ValueError as error:
            return self.note(here, f"`{dotted(here)}`: {error}")
        rest, picked = {key: item for key, item in value.items() if key != MODULE}, f"{dotted(here)}={spec}"
        config = self.section(cls, self.kept(cls, rest, path, picked, instead), path, picked)
        return _INVALID if config is _INVALID else Choice(spec, config)

    def kept(self, cls: type, values: dict, path: KeyPath, picked: str, instead: str) -> dict:
        """The settings without those of the file that belong to the choice that the command line has replaced."""
        known = _keys(cls) if instead else list(values)
        left = [key for key in values if key not in known and not self.source.typed((*path, key))]
        if left:
            keys = ", ".join(f"`{dotted((*path, key))}`" for key in left)
            where = self.source.place((*path, left[0]))
            self.tell(f"{where}: {keys} left out: no setting of {picked}, which stands in place of {instead}")
        return {key: value for key, value in values.items() if key not in left}

    def unknown(self, cls: type, path: KeyPath, key: str, picked: str) -> str:
        """What to say of a key that does not exist: of which alternative it is, or the nearest that does."""
        every = [(dotted(p), alternative) for p, _, alternative in fields_.keys(self.root)]
        here = dotted((*path, key))
        message = f"`{here}` is no key" + (f" of {picked}" if picked else "")
        owners = [alternative for p, alternative in every if p == here and alternative]
        if key.isdigit() and path:
            return f"{message}; `{dotted(path)}` is a mapping and no list, which has no index: leave the {key} out"
        if owners:
            return f"{message}; it belongs to {' and '.join(owners)}"
        tag = picked.partition("=")[0].rpartition(".")[-1]
        known = [*_keys(cls), tag] if tag else _keys(cls)
        siblings = [dotted((*path, name)) for name in difflib.get_close_matches(key, known, 1, 0.6)]
        elsewhere = sorted({p for p, _ in every if p.rsplit(".", 1)[-1] == key})
        near = difflib.get_close_matches(here, [p for p, _ in every], 1, 0.6)
        leaf = [p for p, _ in every if difflib.SequenceMatcher(None, p.rsplit(".", 1)[-1], key).ratio() > 0.8]
        guess = siblings or elsewhere or leaf[:1] or near
        return message + (_meant(guess) or f"; its keys are {_names(cls)}")


def _other_choice(alternatives: Alternatives, value: dict) -> tuple[dict, str]:
    """A choice's mapping, and what the file chose where the command line chooses something else ("" where not).

    The command line's tag takes the place of a file's module, and the other way round."""
    ways = [key for key in (alternatives.tag, MODULE) if isinstance(value.get(key), Typed)]
    if len(ways) != 1 or (MODULE in value and alternatives.load is None):
        return value, ""
    way, other = ways[0], alternatives.tag if ways[0] == MODULE else MODULE
    if other in value:
        return {key: item for key, item in value.items() if key != other}, f"{other}={value[other]}"
    before = value[way].before
    if before is None and way == MODULE:
        return value, alternatives.default
    before = before or alternatives.default
    return value, "" if before == value[way].value else str(before)


def _keys(cls: type) -> list[str]:
    return [field.name for field in fields_.fields(cls)]


def _names(cls: type) -> str:
    return ", ".join(_keys(cls))


def _meant(guesses: list[str]) -> str:
    return f"; did you mean {' or '.join(f'`{guess}`' for guess in guesses)}?" if guesses else ""


def _opened(value: Any) -> Any:
    """A value without the mark of the command line; what is inside it keeps its own."""
    return value.value if isinstance(value, Typed) else value


def _stripped(value: Any) -> Any:
    """A value without the marks of the command line at any depth."""
    value = _opened(value)
    if isinstance(value, dict):
        return {key: _stripped(item) for key, item in value.items()}
    return [_stripped(item) for item in value] if isinstance(value, list) else value


def _constraint(error: pydantic.ValidationError) -> str:
    """What pydantic says where the type was right and the value was not."""
    first = error.errors(include_url=False)[0]
    return "" if first["type"].endswith(("_type", "literal_error", "_parsing")) else f" ({first['msg']})"


def _remedy(annotation: Any, value: Any) -> str:
    wanted = fields_.options(annotation)
    if isinstance(value, str) and value.strip().lower() in ("yes", "no", "on", "off") and bool in wanted:
        return "; write true or false"
    if (
        isinstance(value, str)
        and (int in wanted or float in wanted)
        and value.replace(".", "", 1).lstrip("+-").isdigit()
    ):
        return "; take the quotes away"
    if isinstance(value, int | float) and str in wanted:
        return "; put it in quotes"
    literals = [str(a) for w in wanted if typing.get_origin(w) is typing.Literal for a in typing.get_args(w)]
    return _meant(difflib.get_close_matches(str(value), literals, 1, 0.6)) if literals else ""


def show(value: Any) -> str:
    """A value as it is told in a message: its kind where that is the trouble, and never more than a line of it."""
    value = _stripped(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return f'the text "{value[:80]}{"…" if len(value) > 80 else ""}"'
    kind = {dict: "the mapping ", list: "the list "}.get(type(value), "")
    text = str(value)
    return kind + (text if len(text) <= 80 else text[:80] + "…")


def plain(config: Any) -> Any:
    """A config as plain values that `build` turns into an equal one."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: _plain_field(field, getattr(config, field.name)) for field in fields_.fields(type(config))}
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list | tuple) else config


def _plain_field(field: Field, value: Any) -> Any:
    if field.alternatives is None:
        return plain(value)
    known, tag = field.alternatives.classes, field.alternatives.tag
    chosen = [{tag if one.name in known else MODULE: one.name, **plain(one.value)} for one in _tuple(value)]
    return chosen[0] if len(chosen) == 1 else chosen


def _tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)
