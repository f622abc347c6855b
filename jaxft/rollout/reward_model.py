"""Rewards of texts by a reward model: each is laid out and tokenised as the data that such a model is trained on."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxft.core import tree
from jaxft.data import DataConfig, groups, template, texts
from jaxft.data.errors import DataError
from jaxft.data.forms import Conversation, Pair
from jaxft.data.layout import Span
from jaxft.data.records import Row
from jaxft.data.texts import Encoder, Text
from jaxft.models import slots
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.objectives.terms import Batch
from jaxft.rollout import score as score_
from jaxft.rollout.score import REWARD
from jaxft.sharding import mesh as mesh_

LEAST = 64
"""Narrowest rows; wider ones are a power of two, so that few widths are compiled."""
Scorer = Callable[[Sequence[Any], Sequence[str], Sequence[bool]], list[Any]]
"""``(prompts, completions, finished) -> [number, or the error in its place, ...]``."""


@dataclass(frozen=True)
class Reader:
    """How a reward model's texts become tokens."""

    tokenizer: Any
    """With the chat template."""
    options: Mapping[str, Any] | None = None
    """See `DataConfig.template_options`."""

    @functools.cached_property
    def texts(self) -> Encoder:
        """Of prompts in text."""
        return self._encoder(False)

    @functools.cached_property
    def chats(self) -> Encoder:
        """Of prompts in messages. Raises DataError where there is no template for them."""
        return self._encoder(True)

    def _encoder(self, chats: bool) -> Encoder:
        config = DataConfig(template_options=dict(self.options or {}), loss_on="last")
        return texts.encoder(self.tokenizer, config, "", chats, "labelled")

    def tokens(self, prompts: Sequence[Any], completions: Sequence[str], finished: Sequence[bool]) -> list[Any]:
        """int32[length] of each prompt, text or messages, with its completion; one that did not end has no end. What
        the template refuses is the DataError that says why, in its place."""
        found: list[Any] = []
        for prompt, completion, ended in zip(prompts, completions, finished, strict=True):
            try:
                found.append(self._text(prompt, completion, ended))
            except DataError as error:
                found.append(error)
        kept = [each for each in found if isinstance(each, Text)]
        ids = iter([each.ids for each in texts.tokenise(self.texts, kept)])
        return [next(ids) if isinstance(each, Text) else each for each in found]

    def _text(self, prompt: Any, completion: str, ended: bool) -> Text:
        row = Row({}, "completion")
        if isinstance(prompt, str):
            text = groups.text_of(self.texts, Pair(prompt, completion), row)
            return text if ended else text._replace(suffix=[])
        turns = (*prompt, {"role": "assistant", "content": completion})  # which may be empty, as in no data
        text = groups.text_of(self.chats, Conversation(turns, (None,) * len(turns), (), len(prompt)), row)
        if ended or self.chats.render is None:
            return text
        start, stop = text.spans[-1]
        said = text.text[:stop].rstrip()
        said = said.removesuffix(template.mark_at_end(self.chats.render, said) or "")
        return text._replace(text=said, spans=(Span(start, max(len(said), start)),))


def scorer(
    config: ModelConfig, params: tree.Params, reader: Reader, *, dtype: Any, execution: Execution, batch: int
) -> Scorer:
    """Scores of texts by the reward model ``params``, adapters and all, ``batch`` of them at a time."""
    score = score_.make_score(config, (REWARD,), dtype=dtype, execution=execution)
    place, shards = mesh_.placer(execution.mesh), mesh_.row_shards(execution.mesh)
    rows, reserved = -(-batch // shards) * shards, slots.prompt_length(params)

    @jax.jit
    def scored(params: tree.Params, given: Batch) -> jax.Array:
        return score("reward", params, {name: value[0] for name, value in given.items()})[REWARD]

    def some(ids: Sequence[np.ndarray]) -> np.ndarray:
        width = max(LEAST, 1 << (max(map(len, ids)) - 1).bit_length())
        tokens, segments = np.zeros((2, rows, width), np.int32)
        for i, each in enumerate(ids):
            tokens[i, : len(each)], segments[i, : len(each)] = each, 1
        last = segments.sum(1) - 1
        if reserved:
            tokens, segments, index = score_.make_room(tokens, segments, reserved)
            last = np.take_along_axis(index, np.maximum(last, 0)[:, None], axis=1)[:, 0]
        said = np.asarray(scored(params, place({"tokens": tokens[None], "segments": segments[None]})))
        return said[np.arange(rows), last][: len(ids)]

    def every(prompts: Sequence[Any], completions: Sequence[str], finished: Sequence[bool]) -> list[Any]:
        found = reader.tokens(prompts, completions, finished)
        most = config.max_positions - reserved if config.learned_positions else None
        for i, ids in enumerate(found):
            if most is not None and not isinstance(ids, Exception) and len(ids) > most:
                got = f"{len(ids)} tokens for a reward model of {config.max_positions} positions"
                found[i] = ValueError(f"got {got}; lower data.max_length")
        known = [i for i, ids in enumerate(found) if not isinstance(ids, Exception)]
        known.sort(key=lambda i: len(found[i]))
        for at in range(0, len(known), rows):
            part = known[at : at + rows]
            for i, value in zip(part, some([found[i] for i in part]), strict=True):
                found[i] = float(value)
        return found

    return every
