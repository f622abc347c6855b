"""What must stay together: a pair is a group of two texts, everything else one of its own.

A judged completion is learnt as sft would learn it were it the last turn, its end included, and nothing else of the
sequence is. The prompts of a pair have the same tokens: where a tokenizer lets the end of a prompt run into the reply,
both sequences count as completion from the first token on that differs.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxft.data import formats, layout, template
from jaxft.data.errors import DataError, short
from jaxft.data.forms import Conversation, Document, Labelled, Pair, Preference, Stepwise
from jaxft.data.layout import Span
from jaxft.data.records import SKIP, Row
from jaxft.data.texts import Encoder, Text, Tokens

NAMES = {"pairs": ("chosen", "rejected"), "labelled": ("completion",), "steps": ("completions",)}
"""What the texts of a group are called in errors."""


class Group(NamedTuple):
    """Texts that stay together, and what is known of them."""

    texts: tuple[Text, ...]
    label: bool = False
    margin: float = 0.0


def groups_of(encoder: Encoder, row: Row) -> list[Group]:
    """What there is to tokenise in a row."""
    form = formats.convert(row, encoder.format, encoder.rows)
    if form is None:
        return []
    if isinstance(form, Preference):
        both = same_prompt(text_of(encoder, form.chosen, row), text_of(encoder, form.rejected, row), row)
        if encoder.rows == "labelled":
            return [Group((text,), label) for text, label in zip(both, (True, False), strict=True)]
        if (form.margin is None) == encoder.margin:
            got, expected = ("no margin", "one, as the first row has") if encoder.margin else ("one", "no margin")
            raise DataError(row.where, "margin", got, expected, "Give every row a margin, or none.")
        return [Group(both, margin=form.margin or 0.0)]
    if isinstance(form, Labelled):
        return [Group((text_of(encoder, form.form, row),), form.label)]
    if isinstance(form, Stepwise):
        return [Group((solution(encoder, form, row),))]
    return [Group((text,)) for text in texts_of(encoder, form, row)]


def texts_of(encoder: Encoder, form: Document | Pair | Conversation, row: Row) -> list[Text]:
    """The texts that teach a form."""
    if isinstance(form, Document):
        return [Text(encoder.prefix, form.text, encoder.suffix, (Span(0, len(form.text)),))]
    if isinstance(form, Pair):
        text = form.prompt + form.completion
        start = 0 if encoder.loss_on == "all" else len(form.prompt)
        return [Text(encoder.prefix, text, encoder.suffix, (Span(start, len(text)),))]
    laid = layout.lay_out(form, rendered(encoder, row), encoder.loss_on, row.where)
    return [Text([], each.text, [], each.spans) for each in laid]


def rendered(encoder: Encoder, row: Row) -> template.Renderer:
    """The renderer of chats; a chat among plain texts has none."""
    if encoder.render is None:
        got, expected = "messages", "plain text, as the first rows have"
        raise DataError(row.where, "", got, expected, "Write all rows alike. " + SKIP)
    return encoder.render


def text_of(encoder: Encoder, form: Pair | Conversation, row: Row) -> Text:
    """The one text of a judged completion."""
    found = texts_of(encoder, form, row)
    if len(found) != 1:
        got = f"a completion of several turns, which the chat template shows in {len(found)} different ways"
        raise DataError(row.where, "", got, "one text, to be judged whole", "Set data.loss_on=last. " + SKIP)
    return found[0]


def same_prompt(chosen: Text, rejected: Text, row: Row) -> tuple[Text, Text]:
    """Both, if what stands before their completions is the same text."""
    one, other = (text.text[: text.spans[0].start] for text in (chosen, rejected))
    if one != other:
        at = layout.alike(one, other)
        got = f"{short(one[at:], 40)} before chosen and {short(other[at:], 40)} before rejected"
        expected = "the same prompt before both (they part where the assistant speaks)"
        raise DataError(row.where, "chosen, rejected", got, expected, SKIP)
    return chosen, rejected


def solution(encoder: Encoder, form: Stepwise, row: Row) -> Text:
    """A solution of which each step is a span of its own, with the separator after it: where it ends, it is judged."""
    whole = "".join(step + encoder.separator for step in form.steps)
    if isinstance(form.prompt, str):
        text, prefix, at = form.prompt + whole, encoder.prefix, len(form.prompt)
    else:
        messages = (*form.prompt.messages[:-1], form.prompt.messages[-1] | {"content": whole})
        laid = text_of(encoder, dataclasses.replace(form.prompt, messages=messages), row)
        text, prefix, at = laid.text, [], laid.spans[0].start
    spans = []
    for i, step in enumerate(form.steps):
        # Templates trim what they show: a step is found without the white space around it.
        found = text.find(step.strip(), at)
        if found < 0:
            got = f"{short(step)}, which the chat template does not show as it is"
            raise DataError(row.where, f"completions[{i}]", got, "a template that shows every step", SKIP)
        start, at = at, found + len(step.strip())
        rest = step[len(step.rstrip()) :] + encoder.separator
        at += len(rest) if text.startswith(rest, at) else 0
        spans.append(Span(start, at))
    return Text(prefix, text, [], tuple(spans), form.labels)


def checked(encoder: Encoder, examples: list[Tokens], where: str) -> list[Tokens]:
    """The tokens of a group, if they can be judged. Raises DataError where the prompt leaves no room for that."""
    if encoder.rows == "tokens":
        return examples
    if encoder.rows == "pairs":
        examples = with_same_prompt(*examples)
    room = encoder.room or max(len(each.ids) for each in examples)
    for name, each in zip(NAMES[encoder.rows], examples, strict=True):
        judged = each.steps > 0 if encoder.rows == "steps" else each.loss
        if not judged[1:room].any():
            given = int(np.argmax(each.loss))
            got = f"a prompt of {given:,} tokens, which leaves nothing of `{name}` in a window of {room:,}"
            if given < room:
                got = f"no step that ends in a window of {room:,} tokens"
            raise DataError(where, "prompt", got, "room for what is judged", "Raise data.max_length. " + SKIP)
    if len(examples) == 2 and np.array_equal(examples[0].ids[:room], examples[1].ids[:room]):
        why, remedy = "whose difference the template or the tokenizer takes away", SKIP
        if max(len(each.ids) for each in examples) > room:
            why, remedy = "of which data.max_length cuts what differs", "Raise data.max_length. " + SKIP
        got = f"the same {len(examples[0].ids[:room]):,} tokens in both, {why}"
        raise DataError(where, "chosen, rejected", got, "two different completions", remedy)
    return examples


def with_same_prompt(chosen: Tokens, rejected: Tokens) -> list[Tokens]:
    """Both, judged from the first token on in which their prompts differ."""
    one, other = (each.ids[: int(np.argmax(each.loss))] for each in (chosen, rejected))
    size = min(len(one), len(other))
    shared = int(np.argmin(np.append(one[:size] == other[:size], False)))
    if shared == len(one) == len(other):
        return [chosen, rejected]
    both = []
    for each in (chosen, rejected):
        loss = each.loss.copy()
        loss[shared : int(np.argmax(loss))] = True
        both.append(each._replace(loss=loss))
    return both


def columns(encoder: Encoder, groups: list[Group]) -> dict[str, np.ndarray]:
    """What is known of each text, given the group that it is of."""
    if encoder.rows == "labelled":
        return {"label": np.array([group.label for group in groups], bool)}
    return {"margin": np.array([group.margin for group in groups], np.float32)} if encoder.margin else {}
