"""Rows to tokens and the mask of what is learnt, a chunk of rows at a time; runs in worker processes.

Texts are tokenised whole, in one call a chunk, and learnt characters are mapped to tokens by offsets. Where a learnt
part begins inside a token (`\n` + `\n` merged into one across the boundary), the text is tokenised in pieces instead,
as it is at inference, where the prompt comes alone; unless that changes the text (tokenizers that put a space before
every piece), when the shared token counts as learnt. Both are counted.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxft.data import formats, layout, template
from jaxft.data.config import DataConfig
from jaxft.data.errors import DataError
from jaxft.data.records import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Encoder:
    """All that turns rows into tokens; picklable."""

    tokenizer: "PreTrainedTokenizerFast"
    render: template.Renderer | None
    """None for formats without chats."""
    format: str
    loss_on: str
    prefix: list[int]
    suffix: list[int]
    """What stands before and after a text that is not a chat: BOS where the tokenizer puts it itself, and EOS."""


@dataclass(frozen=True)
class Chunk:
    """The examples of some rows, flat: `tokens`, `loss`, and for each example its length, row and the row's key."""

    tokens: np.ndarray
    loss: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    errors: tuple[DataError, ...]
    silent: int
    """Rows in which no message is to be learnt."""
    cut: int
    """Learnt parts that begin inside a token, tokenised in pieces."""
    shared: int
    """Learnt parts that begin inside a token which had to be learnt whole."""


class Text(NamedTuple):
    """A text to tokenise after `prefix`, ended by `suffix`; characters in `spans` are learnt."""

    prefix: list[int]
    text: str
    suffix: list[int]
    spans: tuple[layout.Span, ...]


class Tokens(NamedTuple):
    """One example."""

    ids: np.ndarray
    loss: np.ndarray
    cut: int
    shared: int


def encoder(tokenizer: "PreTrainedTokenizerFast", config: DataConfig, format: str, needs_template: bool) -> Encoder:
    """The encoder of a data set whose rows are of `format`."""
    name, options = config.template, config.template_options
    render = template.renderer(tokenizer, name, options) if needs_template else None
    if tokenizer.eos_token_id is None:
        got = "a tokenizer without an EOS token"
        remedy = "Set eos_token in tokenizer_config.json."
        raise DataError("", "tokenizer.eos_token", got, "one, to end what is learnt", remedy)
    return Encoder(tokenizer, render, format, config.loss_on, *ends(tokenizer))


def encode(encoder: Encoder, rows: list[Row | DataError], first: int) -> Chunk:
    """Tokenise rows, the first of which has the number `first`."""
    texts: list[Text] = []
    numbers: list[int] = []
    keys: list[int] = []
    errors: list[DataError] = []
    silent = 0
    for number, row in enumerate(rows, first):
        try:
            if isinstance(row, DataError):
                raise row
            found = texts_of(encoder, row)
        except DataError as error:
            errors.append(error)
            continue
        silent += not found
        texts += found
        numbers += [number] * len(found)
        keys += [key_of(row)] * len(found)
    examples = tokenise(encoder.tokenizer, texts)
    return Chunk(
        np.concatenate([each.ids for each in examples] or [np.zeros(0, np.int32)]),
        np.concatenate([each.loss for each in examples] or [np.zeros(0, bool)]),
        np.array([len(each.ids) for each in examples], np.int64),
        np.array(numbers, np.int64),
        np.array(keys, np.uint64),
        tuple(errors),
        silent,
        sum(each.cut for each in examples),
        sum(each.shared for each in examples),
    )


def texts_of(encoder: Encoder, row: Row) -> list[Text]:
    """What there is to tokenise in a row."""
    form = formats.convert(row, encoder.format)
    if isinstance(form, formats.Document):
        return [Text(encoder.prefix, form.text, encoder.suffix, (layout.Span(0, len(form.text)),))]
    if isinstance(form, formats.Pair):
        text = form.prompt + form.completion
        start = 0 if encoder.loss_on == "all" else len(form.prompt)
        return [Text(encoder.prefix, text, encoder.suffix, (layout.Span(start, len(text)),))]
    assert encoder.render is not None, "a chat in a data set without chats"
    laid = layout.lay_out(form, encoder.render, encoder.loss_on, row.where)
    return [Text([], each.text, [], each.spans) for each in laid]


def ends(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """BOS where the tokenizer itself puts one before a text, and EOS, always."""
    bos: Any = tokenizer.bos_token_id
    eos: Any = tokenizer.eos_token_id
    return [bos] if template.begins_with_bos(tokenizer) else [], [eos]


def key_of(row: Row) -> int:
    """64 bits of the row's content: what decides whether it is held out."""
    content = json.dumps(row.fields, sort_keys=True, default=str, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def tokenise(tokenizer: "PreTrainedTokenizerFast", texts: list[Text]) -> list[Tokens]:
    """Tokens and mask of every text."""
    if not texts:
        return []
    # The length of a text is the packer's business: no warning about the model's own.
    whole: Any = tokenizer(
        [each.text for each in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    pairs = zip(texts, whole["input_ids"], whole["offset_mapping"], strict=True)
    return [finish(tokenizer, text, ids, offsets) for text, ids, offsets in pairs]


def finish(tokenizer: "PreTrainedTokenizerFast", text: Text, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    """Mask one text, cutting it where a learnt part begins inside a token, and put its ends on."""
    starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
    shared = [span for span in text.spans if begins_inside(span.start, starts, stops)]
    cut = 0
    if shared:
        pieces = in_pieces(tokenizer, text.text, ids, [span.start for span in shared])
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
    return Tokens(np.array([*prefix, *ids, *suffix], np.int32), loss, cut, len(shared))


def begins_inside(at: int, starts: np.ndarray, stops: np.ndarray) -> bool:
    """Whether position `at` is inside a token; white space that offsets leave out belongs to the token after it."""
    if at == 0:
        return False
    after = int(np.searchsorted(stops, at, side="right"))
    before = int(stops[after - 1]) if after else 0
    return after < len(stops) and before < at


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
