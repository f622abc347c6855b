"""Chat templates: the tokenizer's own Jinja, or one shipped with jaxft, rendered by `transformers`.

Two things are unusual. A template that writes today's date would give other tokens tomorrow, and a resumed run other
batches: the date is fixed. And what a template would silently leave out (tools, tool calls, reasoning) is an error.
"""

import dataclasses
import re
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxft.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHIPPED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama": (),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "alpaca": (),
    "plain": (),
}
"""Template name → tokens that the tokenizer must hold as single tokens."""
DATE = datetime(2024, 7, 26)
"""The date that templates see; Llama 3's own default."""


class Refused(ValueError):
    """The template itself raised an error on these messages."""


@dataclass(frozen=True)
class Renderer:
    """A template with everything it is rendered with; picklable, for worker processes."""

    plain: str
    tools: str
    variables: dict[str, Any]
    specials: tuple[str, ...]
    """Special tokens but BOS, longest first: one of them ends a turn."""
    eos: str
    keeps_turns: bool = False
    """Whether it is one of ours: all replies marked with their ends, none rewritten later."""
    closing: str = ""
    """The special token that the template writes after a chat, behind the end of the last turn."""


def renderer(tokenizer: "PreTrainedTokenizerFast", name: str, options: dict[str, Any]) -> Renderer:
    """The renderer of the template `name` (see `DataConfig.template`)."""
    if tokenizer.eos_token is None:
        got, remedy = "a tokenizer without an EOS token", "Set eos_token in tokenizer_config.json."
        raise DataError("", "tokenizer.eos_token", got, "one, to end what is learnt", remedy)
    added = tokenizer.added_tokens_decoder.values()
    eos = str(tokenizer.eos_token)
    specials = {str(token.content) for token in added if token.special} | {eos}
    if tokenizer.bos_token != eos:
        specials -= {str(tokenizer.bos_token)}
    plain, tools = sources(tokenizer, name)
    variables = {**tokenizer.special_tokens_map, **options}
    marks = tuple(sorted(specials, key=lambda mark: (-len(mark), mark)))
    render = Renderer(freeze_date(plain), freeze_date(tools), variables, marks, eos, name in SHIPPED)
    return dataclasses.replace(render, closing=closing(render))


def install(tokenizer: "PreTrainedTokenizerFast", name: str) -> None:
    """Make `name` the tokenizer's own template, so that generation, chat and export use what was trained on."""
    if name != "tokenizer":
        tokenizer.chat_template = sources(tokenizer, name)[0]


def sources(tokenizer: "PreTrainedTokenizerFast", name: str) -> tuple[str, str]:
    """The Jinja sources for chats without and with tools (some tokenizers hold two)."""
    if name == "tokenizer":
        if not tokenizer.chat_template:
            expected = f"one of {', '.join(SHIPPED)}, or a .jinja file"
            raise DataError("", "data.template", "a tokenizer without a chat template", expected, "Set data.template.")
        own = tokenizer.chat_template
        if isinstance(own, str):
            return own, own
        return tokenizer.get_chat_template(None), tokenizer.get_chat_template(None, tools=[{}])
    if name.endswith(".jinja"):
        if not Path(name).is_file():
            raise DataError(name, "data.template", "no such file", "a Jinja template", "Check the path.")
        text = Path(name).read_text(encoding="utf-8")
        return text, text
    if name not in SHIPPED:
        expected = f"tokenizer, {', '.join(SHIPPED)}, or a path ending in .jinja"
        raise DataError("", "data.template", repr(name), expected, "Set data.template.")
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SHIPPED[name] if token not in vocabulary]
    if missing:
        got = f"{name}, but the tokenizer has no {' and no '.join(missing)}"
        expected = "a template whose marks the tokenizer knows"
        raise DataError("", "data.template", got, expected, "Use llama, alpaca or plain, which need no marks.")
    text = (resources.files("jaxft.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    if "bos_token" not in text and begins_with_bos(tokenizer):
        text = "{{- bos_token }}" + text
    return text, text


def begins_with_bos(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether the tokenizer itself puts BOS before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def freeze_date(source: str) -> str:
    """The template with calls of `strftime_now` replaced by a fixed date."""

    def fixed(match: re.Match[str]) -> str:
        return repr(DATE.strftime(match[2]))

    return re.sub(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)", fixed, source)


def marks_generation(render: Renderer, tools: tuple[Any, ...]) -> bool:
    """Whether the template marks what the assistant says with `{% generation %}`."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", render.tools if tools else render.plain) is not None


def text(render: Renderer, messages: tuple[dict[str, Any], ...], tools: tuple[Any, ...], prompt: bool) -> str:
    """The messages as text; `prompt` adds the opening of the assistant's turn."""
    return call(render, messages, tools, prompt, track=False)[0]


def tracked(
    render: Renderer, messages: tuple[dict[str, Any], ...], tools: tuple[Any, ...]
) -> tuple[str, list[tuple[int, int]]]:
    """The messages as text, and the characters that `{% generation %}` encloses."""
    return call(render, messages, tools, prompt=False, track=True)


def call(
    render: Renderer, messages: tuple[dict[str, Any], ...], tools: tuple[Any, ...], prompt: bool, track: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Render by `transformers`; raises Refused when the template does not take the messages."""
    import jinja2
    from transformers.utils import chat_template_utils

    try:
        rendered: Any = chat_template_utils.render_jinja_template(
            [list(messages)],
            tools=list(tools) or None,
            chat_template=render.tools if tools else render.plain,
            return_assistant_tokens_mask=track,
            add_generation_prompt=prompt,
            **render.variables,
        )
    except jinja2.TemplateError as error:
        raise Refused(str(error)) from error
    texts, spans = rendered
    return texts[0], [(start, stop) for start, stop in spans[0]] if track else []


def closing(render: Renderer) -> str:
    """Show a made-up chat of one exchange, and of two: what follows the first reply only when it is the last."""
    exchange = ({"role": "user", "content": "jaxft asks"}, {"role": "assistant", "content": "jaxft replies"})
    try:
        once, twice = (text(render, exchange * n, (), prompt=False).partition("jaxft replies")[2] for n in (1, 2))
    except Refused:
        return ""
    once = once.rstrip()
    mark = mark_at_end(render, once)
    inner = once.removesuffix(mark).rstrip() if mark else once
    alone = mark is not None and mark_at_end(render, inner) is not None
    return mark if mark and alone and twice.startswith(inner) and not twice.startswith(once) else ""


def mark_at_end(render: Renderer, text: str) -> str | None:
    """The special token that ends the text, white space aside."""
    return next((mark for mark in render.specials if text.rstrip().endswith(mark)), None)


def mark_at_start(render: Renderer, text: str) -> str | None:
    """The special token that begins the text, white space aside."""
    return next((mark for mark in render.specials if text.lstrip().startswith(mark)), None)


def check_shown(render: Renderer, messages: tuple[dict[str, Any], ...], tools: tuple[Any, ...], where: str) -> None:
    """Refuse what the template has no place for, instead of leaving it out in silence."""
    source = render.tools if tools else render.plain
    keys = {key for message in messages for key in message}
    for field, names, present in (
        ("tools", ("tools",), bool(tools)),
        ("tool_calls", ("tool_calls",), "tool_calls" in keys),
    ):
        if present and not any(name in source for name in names):
            got = f"a chat with {field}, and a template that does not show them"
            remedy = "Use a template that knows them (chatml shows tools), or take them out of the data."
            raise DataError(where, field, got, "a template that has a place for them", remedy)
