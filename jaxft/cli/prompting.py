"""A loaded target that answers: its tokenizer, chat template and the tokens that end an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jaxft.checkpoint.errors import CheckpointError
from jaxft.cli import target
from jaxft.cli.target import Target
from jaxft.core import tree
from jaxft.data import template, texts
from jaxft.model import Model
from jaxft.rollout import replies

Message = dict[str, str]


@dataclass(frozen=True)
class Speaker:
    """A model with all that generation needs."""

    model: Model
    params: tree.Params
    tokenizer: Any
    render: template.Renderer | None
    """The chat template; None where the model has none and the config names none."""
    end: list[int]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """A chat as a prompt for the next reply; without a template, the texts one after the other."""
        if self.render is None:
            return self.raw("\n".join(message["content"] for message in messages))
        text = template.text(self.render, tuple(messages), (), prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def raw(self, text: str) -> list[int]:
        """A text as a prompt, to be continued."""
        return texts.ends(self.tokenizer)[0] + self.tokenizer(text, add_special_tokens=False)["input_ids"]


def load(found: Target, mesh: Mesh | None = None) -> Speaker:
    """Loads a target that has a tokenizer, on a mesh if there is one. Raises CheckpointError."""
    model, params = target.load(found, mesh)
    if model.tokenizer is None:
        where = model.source or "the model"
        raise CheckpointError(where, "no tokenizer", "a tokenizer beside the model", "Give a folder that has one.")
    if model.config.labels:
        got, remedy = "a model that scores sequences", "jaxft eval says how well it does."
        raise CheckpointError(model.source or "the model", got, "a language model", remedy)
    data, tokenizer = found.config.data, model.tokenizer
    templated = data.template != "tokenizer" or bool(tokenizer.chat_template)
    render = template.renderer(tokenizer, data.template, data.template_options) if templated else None
    return Speaker(model, params, tokenizer, render, replies.ends(model.ends, render, tokenizer))
