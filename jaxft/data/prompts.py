"""Prompts with the answers that the data gives: for samples during training, and for exact match."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxft.data import encode, formats, mixture, template, texts
from jaxft.data.config import DataConfig
from jaxft.data.examples import Examples
from jaxft.data.forms import Conversation, Pair, taught
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
    task: int = 0
    """The number of its task."""
    source: str = ""
    """The source of a mixture that it is of."""
    given: Any = ""
    """As the data have it: text, or a list of messages."""
    tools: tuple[dict[str, Any], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else its row says, for reward functions; where an objective asks for them (`questions`)."""


def prompts_of(
    examples: Examples,
    format: str,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    limit: int | None = None,
    shots: Sequence[Row] = (),
) -> list[Prompt]:
    """The prompts of the first rows behind examples (see `prompts`); of a mixture a row of each source in turn."""
    if examples.mixture is None:
        return prompts(examples.source_rows()[:limit], format, config, tokenizer, shots)
    found = []
    about = zip(examples.mixture.names, examples.mixture.settings, examples.mixture.formats, strict=True)
    for (name, own, written), part in zip(about, mixture.parts(examples), strict=True):
        said = prompts(part.source_rows()[:limit], written, own, tokenizer, shots)
        found.append([dataclasses.replace(prompt, source=name) for prompt in said])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*found))
    return [prompt for prompt in turns if prompt is not None][:limit]


def prompts(
    rows: Sequence[Row],
    format: str,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    shots: Sequence[Row] = (),
) -> list[Prompt]:
    """One prompt a row (see `Examples.source_rows`): a chat up to its last reply, or a pair's prompt; text has none.

    ``shots``: rows of the same format, shown with their answers before each prompt: turns of the same chat, or pairs
    with an empty line between them."""
    wanted = next(rows for rows, known in formats.FORMATS.items() if format in known)
    forms = [(taught(formats.convert(row, format, wanted)), row) for row in rows]
    shown = [taught(formats.convert(row, format, wanted)) for row in shots]
    before = "".join(f"{s.prompt}{s.completion}\n\n" for s in shown if isinstance(s, Pair))
    turns = [turn for s in shown if isinstance(s, Conversation) for turn in s.messages if turn["role"] != "system"]
    chats = any(isinstance(form, Conversation) for form, _ in forms)
    render = template.renderer(tokenizer, config.template, config.template_options) if chats else None
    prefix, _ = texts.ends(tokenizer)
    found = []
    for form, row in forms:
        task = encode.task_of(row, config.task_column, config.task)
        if isinstance(form, Pair):
            text = before + form.prompt
            ids = tuple(prefix + tokenizer(text, add_special_tokens=False)["input_ids"])
            found.append(Prompt(text, ids, form.completion, row.where, task, given=text))
        elif isinstance(form, Conversation) and render is not None:
            system = [turn for turn in form.messages[:-1] if turn["role"] == "system"]
            own = [turn for turn in form.messages[:-1] if turn["role"] != "system"]
            messages = (*system, *turns, *own) if turns else form.messages[:-1]
            text = template.text(render, messages, form.tools, prompt=True)
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            answer, given = form.messages[-1]["content"], list(messages)
            found.append(Prompt(text, ids, answer, row.where, task, given=given, tools=form.tools))
    return found
