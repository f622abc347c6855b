"""Where in a rendered chat the learnt characters are: exactly, for any template.

A reply is found in the rendering that ends with it. `{% generation %}` marks, where the template has them, say what the
model says; otherwise it is the difference to the opening of its turn (`add_generation_prompt`), which is what the model
will see and continue at inference. A longer rendering may show the reply differently (Qwen3 and DeepSeek strip the
thinking of all but the last): then one text cannot teach every turn, and the conversation is laid out as several texts,
each learning the turns that it shows unchanged. Templates that keep earlier turns give one text.

Every learnt turn ends with its end-of-turn token, learnt too; where a template writes none, EOS is appended. A reply
that the template does not show whole is an error.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxft.data import template
from jaxft.data.errors import DataError, short
from jaxft.data.forms import Conversation
from jaxft.data.turns import REASONING, REMEDY


class Span(NamedTuple):
    """Characters from `start` to `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Laid:
    """A text to tokenise, and the characters learnt in it."""

    text: str
    spans: tuple[Span, ...]


class Reply(NamedTuple):
    """A chat as it stands when the model has replied; `spans` are what it says.

    Beyond `stop` is only what the template writes after a whole chat but not between turns (phi3's EOS)."""

    text: str
    spans: tuple[Span, ...]
    stop: int


def lay_out(chat: Conversation, render: template.Renderer, loss_on: str, where: str) -> list[Laid]:
    """The texts that teach `chat`: none where nothing is learnt, several only where earlier turns are rewritten."""
    template.check_shown(render, chat.messages, chat.tools, where)
    try:
        if loss_on == "all":
            return [everything(chat, render, where)]
        turns = learnt_turns(chat, loss_on)
        if render.keeps_turns and turns:
            return [at_once(chat, render, turns, where)]
        find = marked if template.marks_generation(render, chat.tools) else opened
        replies = [find(chat, render, turn, where) for turn in turns]
    except template.Refused as error:
        got, remedy = f"messages that the chat template refuses ({error})", "Set another data.template. " + REMEDY
        raise DataError(where, "", got, "a chat it can show", remedy) from error
    for turn, reply in zip(turns, replies, strict=True):
        check_said(chat, turn, reply.text[reply.spans[0].start : reply.stop], where)
    return gather(replies)


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
    check_said(chat, assistant_turns(chat)[-1], text, where)
    if template.mark_at_end(render, text) is None:
        text = text.rstrip() + render.eos
    return Laid(text, (Span(0, len(text)),))


def at_once(chat: Conversation, render: template.Renderer, turns: list[int], where: str) -> Laid:
    """One rendering for all turns, with a template of our own, which marks each with its end and never rewrites one."""
    text, spans = template.tracked(render, chat.messages, chat.tools)
    found = dict(zip(assistant_turns(chat), spans, strict=True))
    for turn in turns:
        check_said(chat, turn, text[slice(*found[turn])], where)
    return Laid(text, tuple(Span(*found[turn]) for turn in turns))


def marked(chat: Conversation, render: template.Renderer, turn: int, where: str) -> Reply:
    """What the model says in message `turn` as the template marks it, and the end of the turn, even if not marked."""
    before = template.text(render, chat.messages[:turn], chat.tools, prompt=False)
    text, found = template.tracked(render, chat.messages[: turn + 1], chat.tools)
    spans = [Span(*span) for span in found if span[0] >= alike(before, text) and span[0] < span[1]]
    if not spans:
        return opened(chat, render, turn, where)
    start, stop = spans[-1]
    if not template.mark_at_end(render, text[:stop]):
        after = text[stop:].lstrip()
        mark = template.mark_at_start(render, after)
        # Nothing but the end of a turn can follow the last reply.
        text, stop = (text, len(text) - len(after) + len(mark)) if mark else (text[:stop] + render.eos, None)
        spans[-1] = Span(start, stop or len(text))
    stop = spans[-1].stop
    closed = render.closing and text[:stop].endswith(render.closing)
    return Reply(text, tuple(spans), stop - len(render.closing) if closed else stop)


def opened(chat: Conversation, render: template.Renderer, turn: int, where: str) -> Reply:
    """What the model says in message `turn`: all that follows the opening of its turn."""
    opening = template.text(render, chat.messages[:turn], chat.tools, prompt=True)
    text = template.text(render, chat.messages[: turn + 1], chat.tools, prompt=False)
    start = len(opening)
    if not text.startswith(opening) or len(text) == start:
        same = alike(text, opening)
        got = f"a reply that the template opens with {short(opening[same:])} and then shows as {short(text[same:])}"
        expected = "a reply that continues its opening; else where it begins is unknown"
        remedy = "Set data.template_options (such as enable_thinking: false), or another template, or mark the reply "
        raise DataError(where, f"messages[{turn}]", got, expected, remedy + "with {% generation %} in a .jinja file.")
    end = max(len(text.rstrip()), start)
    if template.mark_at_end(render, text[start:end]) is None:
        text = text[:end] + render.eos
        return Reply(text, (Span(start, len(text)),), len(text))
    if render.closing and text[start:end].endswith(render.closing):
        stop = len(text[: end - len(render.closing)].rstrip())
        return Reply(text, (Span(start, stop), Span(stop, end)), stop)
    return Reply(text, (Span(start, end),), end)


def alike(a: str, b: str) -> int:
    """How many characters two texts share from the start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[:middle]) else (low, middle - 1)
    return low


def gather(replies: list[Reply]) -> list[Laid]:
    """From the last reply back, each text takes in earlier ones that it shows unchanged; the others get their own."""
    left, laid = list(replies), []
    while left:
        last = left.pop()
        shown = [other for other in left if last.text.startswith(other.text[: other.stop])]
        left = [other for other in left if other not in shown]
        spans = [Span(a, min(b, other.stop)) for other in shown for a, b in other.spans if a < other.stop]
        laid.append(Laid(last.text, (*spans, *last.spans)))
    return laid[::-1]


def check_said(chat: Conversation, turn: int, said: str, where: str) -> None:
    """Refuse a template that leaves out part of a reply: its first or last line, its reasoning, or a call."""
    message = chat.messages[turn]
    parts = {"content": message["content"]}
    parts |= {key: message[key] for key in REASONING if isinstance(message.get(key), str)}
    parts |= {f"tool_calls[{i}]": call["function"]["name"] for i, call in enumerate(message.get("tool_calls", ()))}
    for field, part in parts.items():
        lines = [line.strip() for line in part.splitlines() if line.strip()]
        lost = next((line for line in lines[:1] + lines[-1:] if line not in said), None)
        if lost is not None:
            got, expected = (
                f"{short(lost)}, which the chat template leaves out",
                "a template that shows the whole reply",
            )
            remedy = "Use a template that knows it, set data.template_options, or take it out of the data."
            raise DataError(where, f"messages[{turn}].{field}", got, expected, remedy)
