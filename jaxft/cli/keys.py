"""Every key of the config as tables, a section each: name, type, default, meaning."""

import dataclasses
import json
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxft.border import check, fields
from jaxft.border.errors import ConfigError
from jaxft.border.fields import Alternatives, Field
from jaxft.config import RunConfig


def show(sections: Sequence[str] = (), console: Console | None = None, root: type = RunConfig) -> None:
    """Prints the keys of the named sections (none named: of all); ``peft=lora`` names one alternative of a section.
    ``root``: the config that they are sections of.

    Raises ConfigError for a name that does not exist."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    wanted = {section: name for section, _, name in (words.partition("=") for words in sections)}
    every = [field for field in fields.fields(root) if not sections or field.name in wanted]
    _refuse_unknown(wanted, every, root)
    console.print("Keys of the config, in YAML or as key=value:\n", style="bold")
    alone = [field for field in every if not _below(field) and not field.alternatives]
    if alone:
        _table(console, "", "of the run as a whole", [(f.name, f) for f in alone])
    for field in every:
        if field.alternatives:
            _choice(console, field.name, field.doc, field.alternatives, wanted.get(field.name, ""))
        elif classes := _below(field):
            _table(console, field.name, field.doc, rows := _rows(classes[0], field.name))
            for name, each in rows:
                if (named := fields.named_section(each.type)) is not None:
                    _table(console, f"{name}.NAME", _first(named), _rows(named, f"{name}.NAME"))


def _below(field: Field) -> list[type]:
    return [member for member in fields.options(field.type) if fields.is_section(member)]


def _rows(cls: type, prefix: str) -> list[tuple[str, Field]]:
    rows = []
    for field in fields.fields(cls):
        name = f"{prefix}.{field.name}"
        rows += _rows(inner[0], name) if (inner := _below(field)) else [(name, field)]
    return rows


def _refuse_unknown(wanted: dict[str, str], found: list[Field], root: type) -> None:
    known = {field.name: list(field.alternatives.classes) if field.alternatives else [] for field in found}
    for section, name in wanted.items():
        if section not in known:
            sections = ", ".join(field.name for field in fields.fields(root))
            raise ConfigError(f"--help: no section {section!r}; the sections: {sections}")
        if name and name not in known[section]:
            raise ConfigError(f"--help: no {section}={name}; expected one of {', '.join(known[section])}")


def _choice(console: Console, section: str, doc: str, alternatives: Alternatives, only: str = "") -> None:
    """The keys of every alternative, those that several inherit from one class told once; or all of ``only`` one."""
    if only:
        return _alternative(console, section, alternatives, only, _rows(alternatives.classes[only], section))
    tag = Field(alternatives.tag, f"one of {', '.join(alternatives.classes)}", alternatives.doc, alternatives.default)
    _table(console, section, doc, [(f"{section}.{alternatives.tag}", tag)])
    shared = _shared(alternatives)
    for base, names in shared.items():
        _table(console, f"{section} with {alternatives.tag}: {', '.join(names)}", _first(base), _rows(base, section))
    told = {base: _rows(base, section) for base in shared}
    for name, cls in alternatives.classes.items():
        rows = [
            row for row in _rows(cls, section) if not any(row in told[base] for base in told if issubclass(cls, base))
        ]
        _alternative(console, section, alternatives, name, rows)


def _alternative(
    console: Console, section: str, alternatives: Alternatives, name: str, rows: list[tuple[str, Field]]
) -> None:
    _table(console, f"{section} with {alternatives.tag}: {name}", _first(alternatives.classes[name]), rows)


def _shared(alternatives: Alternatives) -> dict[type, list[str]]:
    """Classes that are no alternatives themselves and that several inherit keys from: those alternatives' names."""
    heirs: dict[type, list[str]] = {}
    for name, cls in alternatives.classes.items():
        for base in cls.__mro__[1:]:
            if dataclasses.is_dataclass(base) and base not in alternatives.classes.values() and fields.fields(base):
                heirs.setdefault(base, []).append(name)
    return {base: names for base, names in heirs.items() if len(names) > 1}


def _first(cls: type) -> str:
    return (cls.__doc__ or "").split("\n")[0]


def _table(console: Console, title: str, doc: str, rows: list[tuple[str, Field]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, expand=True)
    table.title = Text.assemble((title, "bold"), "  " if title else "", (doc, "dim"))
    table.title_justify = "left"
    table.add_column("key", style="cyan", overflow="fold", ratio=10)
    table.add_column("default", style="green", overflow="fold", ratio=6)
    table.add_column("meaning", ratio=24)
    for name, field in rows:
        kind = field.type if isinstance(field.type, str) else fields.words(field.type)
        meaning = Text(field.doc.replace("``", "`"))
        table.add_row(Text(name), Text(_default(field)), Text.assemble(meaning, (f" ({kind})", "dim")))
    console.print(table)


def _default(field: Field) -> str:
    if field.required:
        return "required"
    value = check.plain(field.default)
    return value if isinstance(value, str) and value else json.dumps(value)
