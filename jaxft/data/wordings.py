"""Prompt templates: a task told in several wordings, of which each row gets one, as FLAN and T0 are made.

A wording fills the columns of a row into texts and gives a row of other columns, which is then recognised like any
other: `input` and `target` make an exchange, `prompt` and `completion` text that continues, `prompt`, `chosen` and
`rejected` a preference. Wordings are texts with `{column}` or Jinja (Wei et al. 2022, arXiv:2109.01652; Sanh et al.
2022, arXiv:2110.08207). Files of promptsource are read as they are, its `answer_choices`, `|||` and filters included.
"""

import dataclasses
import functools
import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxft.data import encode, records
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError, short
from jaxft.data.records import SKIP, Records, Row

SPLIT = "|||"
_HIDDEN = "\ue000"  # stands for the `|||` of a column: a character of private use
FIELD = r"\{([A-Za-z_]\w*)\}"
NAMES = {"input": "inputs", "target": "targets"}
"""Columns as the format `flan` has them."""
KEPT = ("label", "labels", "margin", "tools")
"""Columns that a row keeps: they judge, and say nothing of the wording."""


@dataclass(frozen=True)
class Wording:
    """One prompt template: the texts of the columns that it makes."""

    name: str
    where: str
    texts: tuple[tuple[str, str], ...]
    choices: str | None = None
    """Jinja for the answers to choose from, `|||` between them (`answer_choices`)."""
    whole: bool = False
    """Whether the one text holds input and target, `|||` between them, where a column's own `|||` does not count."""

    def __str__(self) -> str:
        return f"template {self.name!r} of {self.where}"


@dataclass(frozen=True)
class Told:
    """Rows told by prompt templates, `each` of them for every row of the source."""

    source: Records
    wordings: tuple[Wording, ...]
    each: int
    seed: int
    task_column: str | None

    def __len__(self) -> int:
        return len(self.source) * self.each

    def rows(self, start: int, stop: int) -> list[Row | DataError]:
        """Rows from `start` to `stop`."""
        if start >= stop:
            return []
        first = start // self.each
        found = self.source.rows(first, -(-stop // self.each))
        several = [row if isinstance(row, DataError) else self._told(row) for row in found]
        flat = [one for each in several for one in (each if isinstance(each, list) else [each] * self.each)]
        return flat[start - first * self.each : stop - first * self.each]

    def identity(self) -> Any:
        """What tells these rows from others: see `records.fingerprint`."""
        templates = [dataclasses.astuple(wording) for wording in self.wordings]
        return [records.fingerprint(self.source), templates, self.each, self.seed, self.task_column]

    def _told(self, row: Row) -> list[Row | DataError]:
        """The row by the first templates, in an order of its own, that have something to say of it."""
        content = encode.key_of(row)
        order = sorted(self.wordings, key=lambda wording: _hash(f"{self.seed}/{content}/{wording.name}"))
        made: list[Row | DataError] = []
        for wording in order:
            if len(made) == self.each:
                return made
            try:
                fields = filled(wording, row, _hash(f"{self.seed}/{content}"))
            except DataError as error:
                made.append(error)
                continue
            if fields:
                kept = {name: row.fields[name] for name in (*KEPT, self.task_column) if name in row.fields}
                made.append(Row({**kept, **fields}, f"{row.where} ({wording})", content))
        got, expected = f"{len(made)} templates that say anything of this row", f"{self.each} (data.prompts_a_row)"
        missing = DataError(row.where, "prompts", got, expected, "Add templates, or leave the row out. " + SKIP)
        return made + [missing] * (self.each - len(made))


def told(source: Records, config: DataConfig) -> Records:
    """The rows of a source told by `data.prompts`. Raises DataError for templates that cannot be used."""
    if config.prompts is None:
        return source
    found = read(config.prompts)
    if not 1 <= config.prompts_a_row <= len(found):
        got, expected = str(config.prompts_a_row), f"1 to {len(found)}, as many as there are templates"
        raise DataError("", "data.prompts_a_row", got, expected, "")
    made = Told(source, found, config.prompts_a_row, config.prompts_seed, config.task_column)
    return Records((made,), len(made), {})


def read(prompts: str | Sequence[str | dict[str, str]]) -> tuple[Wording, ...]:
    """Templates from a YAML file, or as they stand in a config. Raises DataError naming file and template."""
    if not isinstance(prompts, str):
        return _unlike([_wording(f"{i}", each, "data.prompts") for i, each in enumerate(prompts, 1)], "data.prompts")
    if not Path(prompts).is_file():
        remedy = "Check the path, or write the templates as a list."
        raise DataError(prompts, "data.prompts", "no such file", "a YAML file of prompt templates", remedy)
    try:
        value = yaml.load(Path(prompts).read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        where = f"{prompts}:{place.line + 1}" if place else prompts
        raise DataError(where, "data.prompts", f"what is no YAML ({error})", "prompt templates", "Mend it.") from None
    if isinstance(value, dict) and isinstance(value.get("templates"), dict | list):
        value = value["templates"]
    named = list(enumerate(value, 1)) if isinstance(value, list) else list(value.items()) if value else []
    if not isinstance(value, dict | list) or not named:
        expected = "a list of templates, or a mapping of names to them"
        raise DataError(prompts, "data.prompts", short(value), expected, "")
    return _unlike([_wording(str(name), each, prompts) for name, each in named], prompts)


def _unlike(found: list[Wording], where: str) -> tuple[Wording, ...]:
    twice = [name for name, count in Counter(wording.name for wording in found).items() if count > 1]
    if not found or twice:
        got = f"{twice[0]!r} twice" if twice else "none"
        raise DataError(where, "data.prompts", got, "templates, each with a name of its own", "Rename one.")
    return tuple(found)


def _wording(name: str, value: Any, where: str) -> Wording:
    """One template as a file or a config has it."""
    value = {"jinja": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        expected = f"a text with {SPLIT}, or a mapping of columns to texts"
        raise DataError(where, f"template {name!r}", short(value), expected, "Write it so.")
    name, choices = str(value.get("name") or name), value.get("answer_choices")
    choices = SPLIT.join(map(str, choices)) if isinstance(choices, list) else choices
    if "jinja" in value:
        texts, whole = {"jinja": value["jinja"]}, True
    else:
        texts, whole = {k: v for k, v in value.items() if k not in ("name", "answer_choices")}, False
    for column, text in texts.items():
        if not isinstance(text, str):
            raise DataError(where, f"template {name!r}", f"{column}: {short(text)}", "a text", "")
    if whole and SPLIT not in texts["jinja"]:
        got, remedy = short(texts["jinja"]), f"Write the input, {SPLIT}, and the target."
        raise DataError(where, f"template {name!r}", got, f"a text with {SPLIT} between input and target", remedy)
    if not texts:
        raise DataError(where, f"template {name!r}", "no text", "columns and their texts (input, target)", "")
    made = Wording(name, where, tuple(texts.items()), choices, whole)
    for _, text in (*made.texts, ("answer_choices", choices or "")):
        _compiled(made, text)
    return made


def filled(wording: Wording, row: Row, seed: int) -> dict[str, Any]:
    """The columns that a template makes of a row; empty where all of it comes out blank. `seed`: of its filter
    `choice`. Raises DataError naming row and template."""
    fields = {name: _hidden(value) for name, value in row.fields.items()} if wording.whole else dict(row.fields)
    draw = random.Random(seed)
    try:
        if wording.choices is not None:
            if "answer_choices" in fields:
                raise ValueError("the row has a column `answer_choices` of its own")
            listed = _render(wording, wording.choices, fields, draw).split(SPLIT)
            fields["answer_choices"] = [choice.strip() for choice in listed]
        made = {name: _render(wording, text, fields, draw) for name, text in wording.texts}
    except Exception as error:  # whatever a template's own code raises
        got = f"{wording} failing on it ({type(error).__name__}: {error})"
        columns = f"a row that it fits (columns: {', '.join(map(str, row.fields))})"
        raise DataError(row.where, "prompts", got, columns, "Mend the template. " + SKIP) from None
    if wording.whole:
        parts = [part.replace(_HIDDEN, SPLIT).strip() for part in made["jinja"].split(SPLIT)]
        made = {"input": parts[0], "target": parts[1] if len(parts) > 1 else ""}
        if len(parts) > 2:
            got = f"{wording} giving {len(parts)} parts"
            raise DataError(row.where, "prompts", got, "an input and a target", "Mend the template. " + SKIP)
    if not any(text.strip() for text in made.values()) or (wording.whole and not made["target"]):
        return {}
    for name, text in made.items():
        if not text.strip():
            got = f"an empty `{name}` by {wording}"
            raise DataError(row.where, "prompts", got, "some text", "Mend the template. " + SKIP)
    return {NAMES.get(name, name): text for name, text in made.items()}


def _hidden(value: Any) -> Any:
    return value.replace(SPLIT, _HIDDEN) if isinstance(value, str) else value


def _render(wording: Wording, text: str, fields: dict[str, Any], draw: random.Random) -> str:
    compiled = _compiled(wording, text)
    if isinstance(compiled, str):
        return re.sub(FIELD, lambda match: _column(fields, match[1]), compiled)
    mixed = [name for name in re.findall(rf"(?<!\{{){FIELD}(?!\}})", text) if name in fields]
    if mixed:
        raise ValueError(f"it has {{{mixed[0]}}} beside Jinja, where a column is {{{{ {mixed[0]} }}}}")
    return compiled.render(**fields, _draw=draw)


def _column(fields: dict[str, Any], name: str) -> str:
    if fields.get(name) is None:
        raise KeyError(f"no column {name}")
    return str(fields[name])


@functools.lru_cache(maxsize=4096)
def _compiled(wording: Wording, text: str) -> Any:
    """A Jinja template, or the text itself where it has `{column}` at most."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not re.search(r"\{[{%#]", text):
        return text
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.globals["zip"] = zip
    environment.filters["choice"] = jinja2.pass_context(lambda context, items: context["_draw"].choice(items))
    environment.filters["most_frequent"] = most_frequent
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        got, place = f"what Jinja does not read ({error.message}, line {error.lineno})", f"template {wording.name!r}"
        raise DataError(wording.where, place, got, "a Jinja template", "Mend it.") from None


def most_frequent(items: Sequence[Any]) -> list[Any]:
    """The items that occur most often, as promptsource's filter of this name."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that reads promptsource's own objects as mappings."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))  # type: ignore[arg-type]
