"""Replies to prompts: text that a model generates for the prompts of a data set, and whether it is the answer there.

Exact match is equality of the text, white space at both ends apart; the end-of-turn token is no part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.core import tree
from jaxft.data import template
from jaxft.data.prompts import Prompt
from jaxft.models import decoder
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.rollout import generate
from jaxft.rollout.generate import GenerateConfig


@dataclass(frozen=True)
class Reply:
    """What the model said to one prompt."""

    prompt: Prompt
    text: str
    finished: bool
    """Whether it ended by itself, rather than at ``max_new_tokens``."""
    tokens: tuple[int, ...] = ()
    """With the one that ended it."""

    @property
    def exact(self) -> bool:
        """Whether it is the answer of the data."""
        return self.text.strip() == self.prompt.answer.strip()


def replies(
    config: ModelConfig,
    params: tree.Params,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    settings: GenerateConfig,
    end: Sequence[int],
    *,
    execution: Execution = decoder.DEFAULT,
    adapters: Sequence[int] | None = None,
) -> list[Reply]:
    """One reply a prompt, in order. ``end``: token ids that end a reply (see `ends`); for ``adapters`` see
    `generate.generate`."""
    if not prompts:
        return []
    rows = [prompt.tokens for prompt in prompts]
    tasks = [prompt.task for prompt in prompts]
    made = generate.generate(
        config, params, rows, settings, end, execution=execution, adapters=adapters, tokenizer=tokenizer,
        tasks=tasks if any(tasks) else None,
    )  # fmt: skip
    return [
        Reply(
            prompt,
            spoken(tokenizer, completion.tokens, end, settings.stop),
            completion.finished,
            tuple(completion.tokens),
        )
        for prompt, completion in zip(prompts, made, strict=True)
    ]


def spoken(tokenizer: Any, tokens: Sequence[int], end: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of a completion up to the token, or the text, that ended it."""
    kept = tokens[:-1] if tokens and tokens[-1] in end else tokens
    return generate.cut(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False), stop)


def ends(own: Sequence[int], render: template.Renderer | None, tokenizer: Any) -> list[int]:
    """Token ids that end a reply: the model's own (`generate.ends_of`), and what the template ends a turn with."""
    if render is None:
        return sorted(own)
    chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "jaxft"})
    after = template.text(render, chat, (), prompt=False).rpartition("jaxft")[2].lstrip()
    marks = [mark for mark in render.specials if after.startswith(mark)]
    return sorted({*own, *(tokenizer.convert_tokens_to_ids(mark) for mark in marks[:1])})
