"""Texts to tokens and the mask of what is learnt.

Texts are tokenised whole, in one call a chunk, and learnt characters are mapped to tokens by offsets. At inference the
prompt comes alone: where that gives other tokens than the whole text has (a line break at its end that merges with one
that begins the reply), the text is tokenised in pieces; unless that changes the text (tokenizers that put a space
before every piece), when a token that belongs to both counts as learnt. Both are counted.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxft.data import layout, template
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


LEADS = 1000


@dataclass(frozen=True)
class Encoder:
    """All that turns rows into tokens; picklable."""

    tokenizer: "PreTrainedTokenizerFast"
    render: template.Renderer | None
    """None for formats without chats."""
    format: str
    loss_on: str
    task_column: str | None
    prefix: list[int]
    suffix: list[int]
    """What stands before and after a text that is not a chat: BOS where the tokenizer puts it itself, and EOS."""
    added: re.Pattern[str]
    """Finds the tokens that split a text wherever they stand."""
    rows: str = "tokens"
    """What an objective wants of a row (`Objective.rows`)."""
    room: int | None = None
    """Tokens that a judged sequence is cut to; None: it is not cut, or not judged."""
    separator: str = "\n"
    """What stands after each step of a solution."""
    margin: bool = False
    """Whether the first good row has a margin: then all must."""
    task: int = 0
    """The task of rows without a column for it."""
    leads: dict[str, list[int]] = field(default_factory=dict)
    """Tokens of the stretches that lead up to learnt parts, which are few and come again and again."""


class Text(NamedTuple):
    """A text to tokenise after `prefix`, ended by `suffix`; characters in `spans` are learnt."""

    prefix: list[int]
    text: str
    suffix: list[int]
    spans: tuple[layout.Span, ...]
    steps: tuple[bool, ...] = ()
    """Whether each span, a step of a solution, is right."""


class Tokens(NamedTuple):
    """One example."""

    ids: np.ndarray
    loss: np.ndarray
    cut: int
    shared: int
    steps: np.ndarray
    """int8, as long as `ids`: 2 where a right step ends, 1 where a wrong one does, 0 elsewhere."""


def encoder(
    tokenizer: "PreTrainedTokenizerFast",
    config: DataConfig,
    format: str,
    needs_template: bool,
    rows: str = "tokens",
    margin: bool = False,
    reserved: int = 0,
) -> Encoder:
    """The encoder of a data set whose rows are of `format`; see `Encoder` and `prepare`."""
    name, options = config.template, config.template_options
    render = template.renderer(tokenizer, name, options) if needs_template else None
    if tokenizer.eos_token_id is None:
        got = "a tokenizer without an EOS token"
        remedy = "Set eos_token in tokenizer_config.json."
        raise DataError("", "tokenizer.eos_token", got, "one, to end what is learnt", remedy)
    names = sorted((str(token.content) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    added = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    prefix, suffix = ends(tokenizer)
    return Encoder(
        tokenizer,
        render,
        format,
        config.loss_on,
        config.task_column,
        prefix,
        suffix,
        added,
        rows,
        config.max_length - reserved if rows != "tokens" and config.overlong == "truncate" else None,
        config.step_separator,
        margin,
        config.task,
    )


def ends(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """BOS where the tokenizer itself puts one before a text, and EOS, always."""
    bos: Any = tokenizer.bos_token_id
    eos: Any = tokenizer.eos_token_id
    return [bos] if template.begins_with_bos(tokenizer) else [], [eos]


def tokenise(encoder: Encoder, texts: list[Text]) -> list[Tokens]:
    """Tokens and mask of every text."""
    if not texts:
        return []
    # The length of a text is the packer's business: no warning about the model's own.
    whole: Any = encoder.tokenizer(
        [each.text for each in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    pairs = zip(texts, whole["input_ids"], whole["offset_mapping"], strict=True)
    return [finish(encoder, text, ids, offsets) for text, ids, offsets in pairs]


def finish(encoder: Encoder, text: Text, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    """Mask one text, cut where its prompts alone have other tokens, and put its ends on."""
    starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
    shared = unlike_prompts(encoder, text, ids, starts, stops)
    cut = 0
    if shared:
        pieces = in_pieces(encoder.tokenizer, text.text, ids, shared)
        if pieces is not None:
            ids, starts, stops = pieces
            cut, shared = len(shared), []
    learnt = np.zeros(len(ids), bool)
    for start, stop in text.spans:
        learnt |= (starts < stop) & (stops > start)
    # An end that the text brings itself is not written twice.
    suffix = [] if text.suffix and ids[-1:] == text.suffix else text.suffix
    prefix = [] if text.prefix and ids[:1] == text.prefix else text.prefix
    loss = np.concatenate((np.zeros(len(prefix), bool), learnt, np.ones(len(suffix), bool)))
    steps = np.zeros(len(loss), np.int8)
    for (_, stop), right in zip(text.spans, text.steps, strict=False):
        steps[len(prefix) + np.flatnonzero(starts < stop)[-1]] = 2 if right else 1
    return Tokens(np.array([*prefix, *ids, *suffix], np.int32), loss, cut, len(shared), steps)


def unlike_prompts(encoder: Encoder, text: Text, ids: list[int], starts: np.ndarray, stops: np.ndarray) -> list[int]:
    """Beginnings of learnt parts before which the tokens are not those of the text that leads up to there, alone.

    Added tokens split a text, so only what follows the last of them needs a look."""
    marks = np.array([match.start() for match in encoder.added.finditer(text.text)], np.int64)
    found = []
    for at, _ in text.spans:
        before = marks[: np.searchsorted(marks, at)]
        first = int(before[-1]) if len(before) else 0
        lead = text.text[first:at]
        if lead and lead not in encoder.leads:
            if len(encoder.leads) > LEADS:
                encoder.leads.clear()
            encoder.leads[lead] = encoder.tokenizer(lead, add_special_tokens=False)["input_ids"]
        low, high = np.searchsorted(starts, first), np.searchsorted(stops, at, side="right")
        if lead and ids[low:high] != encoder.leads[lead]:
            found.append(at)
    return found


def in_pieces(
    tokenizer: "PreTrainedTokenizerFast", text: str, whole: list[int], cuts: list[int]
) -> tuple[list[int], np.ndarray, np.ndarray] | None:
    """Ids and offsets of the text tokenised piece by piece; None if the pieces no longer spell the same text."""
    ids: list[int] = []
    offsets: list[np.ndarray] = []
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece: Any = tokenizer(text[start:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += piece["input_ids"]
        offsets.append(np.array(piece["offset_mapping"], np.int64).reshape(-1, 2) + start)
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != tokenizer.decode(
        whole, clean_up_tokenization_spaces=False
    ):
        return None
    starts, stops = np.concatenate(offsets).T
    return ids, starts, stops
