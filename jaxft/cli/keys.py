"""Every key of the config as tables, a section each: name, type, default, meaning."""

import json
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxft.border import check, fields
from jaxft.border.fields import Alternatives, Field
from jaxft.config import RunConfig


def show(sections: Sequence[str] = (), console: Console | None = None) -> None:
    """Prints the keys of the named sections (none named: of all)."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    every = [field for field in fields.fields(RunConfig) if not sections or field.name in sections]
    console.print("Keys of the config, in YAML or as key=value:\n", style="bold")
    alone = [field for field in every if not _below(field) and not field.alternatives]
    if alone:
        _table(console, "", "of the run as a whole", [(f.name, f) for f in alone])
    for field in every:
        if field.alternatives:
            _choice(console, field.name, field.doc, field.alternatives)
        elif classes := _below(field):
            _table(console, field.name, field.doc, _rows(classes[0], field.name))


def _below(field: Field) -> list[type]:
    return [member for member in fields.options(field.type) if fields.is_section(member)]


def _rows(cls: type, prefix: str) -> list[tuple[str, Field]]:
    rows = []
    for field in fields.fields(cls):
        name = f"{prefix}.{field.name}"
        rows += _rows(inner[0], name) if (inner := _below(field)) else [(name, field)]
    return rows


def _choice(console: Console, section: str, doc: str, alternatives: Alternatives) -> None:
    tag = Field(alternatives.tag, f"one of {', '.join(alternatives.classes)}", alternatives.doc, alternatives.default)
    _table(console, section, doc, [(f"{section}.{alternatives.tag}", tag)])
    for name, cls in alternatives.classes.items():
        title = f"{section} with {alternatives.tag}: {name}"
        _table(console, title, (cls.__doc__ or "").split("\n")[0], _rows(cls, section))


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
