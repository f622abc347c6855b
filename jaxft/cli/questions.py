"""Prompts to answer, from rows of any format: all that stands before the last reply, or a column `prompt` alone."""

from typing import Any

from jaxft import data
from jaxft.data import DataConfig, Prompt
from jaxft.data import examples as examples_
from jaxft.data.records import Row


def rows_of(config: DataConfig, wanted: str, limit: int | None) -> tuple[list[Row], str]:
    """The first rows of a source and their format: "" where they have a prompt, whatever else they hold.

    Raises DataError for a row that cannot be read, unless those are skipped."""
    source, rows = examples_.read(config), []
    if not any(isinstance(row, Row) and "prompt" in row.fields for row in source.rows(0, 1)):
        source, written = examples_.opened(source, config.path, config, wanted)
    else:
        written = ""
    for row in source.rows(0, len(source) if limit is None else min(limit, len(source))):
        if isinstance(row, Row):
            rows.append(row)
        elif config.on_error == "refuse":
            raise row
    return rows, written


def prompts(rows: list[Row], written: str, config: DataConfig, tokenizer: Any) -> list[Prompt]:
    """The prompts of rows of a format; of none (""): of their column `prompt`."""
    if not written:
        rows, written = [_asking(row) for row in rows], "prompt_completion"
    return data.prompts(rows, written, config, tokenizer)


def _asking(row: Row) -> Row:
    """The prompt of a row with a completion that stands for the answer."""
    prompt = row.fields.get("prompt")
    reply: Any = "-" if isinstance(prompt, str) else [{"role": "assistant", "content": "-"}]
    kept = {name: value for name, value in row.fields.items() if name in ("prompt", "tools")}
    return Row({**kept, "completion": reply}, row.where)
