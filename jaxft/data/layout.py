"""Where in a rendered chat the learnt characters are: exactly, for any template.

With `{% generation %}` marks the template says so itself. Without them, what the model is to say in turn k is the
difference between two renderings: up to and with its reply, and up to the opening of its turn
(`add_generation_prompt`). That is what it will see and say at inference. A later rendering may show earlier turns
differently (Qwen3 and DeepSeek strip the thinking of all but the last): then one text cannot teach every turn, and the
conversation is laid out as several texts, each learning the turns that it shows unchanged. Templates that keep earlier
turns give one text.

Every learnt turn ends with its end-of-turn token, learnt too; where a template writes none, EOS is appended.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxft.data import template
from jaxft.data.errors import DataError, short
from jaxft.data.formats import Conversation
from jaxft.data.turns import REMEDY


class Span(NamedTuple):
    """Characters from `start` to `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Laid:
    """A text to tokenise, and the characters learnt in it."""

    text: str
    spans: tuple[Span, ...]


def lay_out(chat: Conversation, render: template.Renderer, loss_on: str, where: str) -> list[Laid]:
    """The texts that teach `chat`: none where nothing is learnt, several only where earlier turns are rewritten."""
    template.check_shown(render, chat.messages, chat.tools, where)
    try:
        if loss_on == "all":
            return [everything(chat, render, where)]
        turns = learnt_turns(chat, loss_on)
        marked = by_marks(chat, render, turns) if template.marks_generation(render, chat.tools) else None
        return [marked] if marked else by_boundaries(chat, render, turns, where)
    except template.Refused as error:
        got, remedy = f"messages that the chat template refuses ({error})", "Set another data.template. " + REMEDY
        raise DataError(where, "", got, "a chat it can show", remedy) from error


def learnt_turns(chat: Conversation, loss_on: str) -> list[int]:
    """Indices of the messages to learn: a message's own flag, else `loss_on`."""
    replies = assistant_turns(chat)
    chosen = replies[-1:] if loss_on == "last" else [i for i in replies if i >= chat.given]
    return [i for i in replies if (i in chosen if chat.train[i] is None else chat.train[i])]


def assistant_turns(chat: Conversation) -> list[int]:
    """Indices of all that the assistant says."""
    return [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]


def everything(chat: Conversation, render: template.Renderer, where: str) -> Laid:
    """The whole chat, learnt whole."""
    if any(flag is not None for flag in chat.train):
        got, remedy = "flags on messages with data.loss_on=all", "Use data.loss_on=assistant, where flags count."
        raise DataError(where, "train", got, "no flags", remedy)
    text = template.text(render, chat.messages, chat.tools, prompt=False)
    if mark_at_end(text, render) is None:
        text = text.rstrip() + render.eos
    return Laid(text, (Span(0, len(text)),))


def by_marks(chat: Conversation, render: template.Renderer, turns: list[int]) -> Laid | None:
    """Use the template's marks; None unless they hold every reply, with an end-of-turn token in or right after them."""
    text, marks = template.tracked(render, chat.messages, chat.tools)
    spans, replies = [Span(*mark) for mark in marks], assistant_turns(chat)
    if len(spans) != len(replies) or any(span.stop <= span.start for span in spans):
        return None
    # Nothing but the end of a turn can follow the last reply, so the last reply tells which token that is.
    start, stop = spans[-1]
    mark = mark_at_end(text[start:stop], render) or mark_at_start(text[stop:], render)
    if mark is None and len(spans) == 1:
        text, mark = text[:stop] + render.eos, render.eos
    closed = [close(text, span, mark) for span in spans] if mark else [None]
    if None in closed:
        return None
    return Laid(text, tuple(span for i, span in zip(replies, closed, strict=True) if span and i in turns))


def close(text: str, span: Span, mark: str) -> Span | None:
    """The reply up to its end-of-turn token, which is the last thing in it or the first after it."""
    inside = text[span.start : span.stop].rstrip()
    if inside.endswith(mark):
        return Span(span.start, span.start + len(inside))
    at = len(text) - len(text[span.stop :].lstrip())
    return Span(span.start, at + len(mark)) if text.startswith(mark, at) else None


def mark_at_end(text: str, render: template.Renderer) -> str | None:
    """The special token that ends the text, white space aside."""
    return next((mark for mark in render.specials if text.rstrip().endswith(mark)), None)


def mark_at_start(text: str, render: template.Renderer) -> str | None:
    """The special token that begins the text, white space aside."""
    return next((mark for mark in render.specials if text.lstrip().startswith(mark)), None)


class Reply(NamedTuple):
    """A chat as it stands when the model has replied: `text[start:stop]` is what the model says."""

    text: str
    start: int
    stop: int


def by_boundaries(chat: Conversation, render: template.Renderer, turns: list[int], where: str) -> list[Laid]:
    """From the last reply back, each text takes in earlier ones that it shows unchanged; the others get their own."""
    left = [reply(chat, render, turn, where) for turn in turns]
    laid: list[Laid] = []
    while left:
        last = left.pop()
        shown = [other for other in left if last.text.startswith(other.text[: other.stop])]
        left = [other for other in left if other not in shown]
        laid.append(Laid(last.text, tuple(Span(each.start, each.stop) for each in [*shown, last])))
    return laid[::-1]


def reply(chat: Conversation, render: template.Renderer, turn: int, where: str) -> Reply:
    """What the model sees and says in message `turn`."""
    opening = template.text(render, chat.messages[:turn], chat.tools, prompt=True)
    text = template.text(render, chat.messages[: turn + 1], chat.tools, prompt=False)
    start = len(opening)
    if not text.startswith(opening) or len(text) == start:
        same = next((i for i, (a, b) in enumerate(zip(text, opening, strict=False)) if a != b), min(len(text), start))
        got = f"a reply that the template opens with {short(opening[same:])} and then shows as {short(text[same:])}"
        expected = "a reply that continues its opening; else where it begins is unknown"
        remedy = "Mark the reply in the template with {% generation %} and pass it as a .jinja file, or use another."
        raise DataError(where, f"messages[{turn}]", got, expected, remedy)
    said = text[start:].rstrip()
    if mark_at_end(said, render):
        return Reply(text, start, start + len(said))
    text = text[:start] + said + render.eos
    return Reply(text, start, len(text))
