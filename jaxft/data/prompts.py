"""Prompts with the answers that the data gives: for samples during training, and for exact match."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxft.data import encode, formats, template
from jaxft.data.config import DataConfig
from jaxft.data.records import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prompt:
    """What the model is given, as text and as tokens, and the answer of the data."""

    text: str
    tokens: tuple[int, ...]
    answer: str
    where: str


def prompts(rows: Sequence[Row], format: str, config: DataConfig, tokenizer: "PreTrainedTokenizerFast") -> list[Prompt]:
    """One prompt a row (see `Examples.source_rows`): a chat up to its last reply, or a pair's prompt; text has none."""
    forms = [(formats.convert(row, format), row) for row in rows]
    chats = any(isinstance(form, formats.Conversation) for form, _ in forms)
    render = template.renderer(tokenizer, config.template, config.template_options) if chats else None
    prefix, _ = encode.ends(tokenizer)
    found = []
    for form, row in forms:
        if isinstance(form, formats.Pair):
            ids = tuple(prefix + tokenizer(form.prompt, add_special_tokens=False)["input_ids"])
            found.append(Prompt(form.prompt, ids, form.completion, row.where))
        elif isinstance(form, formats.Conversation) and render is not None:
            text = template.text(render, form.messages[:-1], form.tools, prompt=True)
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            found.append(Prompt(text, ids, form.messages[-1]["content"], row.where))
    return found
