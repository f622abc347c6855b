"""Which of several texts a model would go on with: their log-probabilities after a prompt, without sampling any.

A label is a text such as A or 10, in any of its spellings in tokens (with a space before it or without). Where one
spelling begins with another, as 10 does with 1, the shorter one stands for itself alone: the longer one's probability
is no part of its own.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.models import decoder, heads
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.rollout import score
from jaxft.sharding import mesh as mesh_

Spelling = tuple[int, ...]


def spellings(tokenizer: Any, labels: Sequence[str]) -> dict[str, set[Spelling]]:
    """How each label is written in tokens. Raises ValueError where two are written alike."""
    found: dict[str, set[Spelling]] = {}
    for label in labels:
        ways = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (label, f" {label}")]
        own = tokenizer.convert_tokens_to_ids(label)
        ways += [] if own is None or own == tokenizer.unk_token_id else [(own,)]
        found[label] = {way for way in ways if way and tokenizer.unk_token_id not in way}
        same = [other for other in found if other != label and found[other] & found[label]]
        if same or not found[label]:
            other = f"as {same[0]!r} is" if same else "not at all"
            raise ValueError(f"labels: the tokenizer writes {label!r} {other}; expected one that tells labels apart")
    return found


def logprobs(
    config: ModelConfig,
    params: tree.Params,
    prompts: Sequence[Sequence[int]],
    labels: Mapping[str, set[Spelling]],
    *,
    batch: int,
    execution: Execution = decoder.DEFAULT,
) -> list[dict[str, float]]:
    """log p(label | prompt) in nats, of each label for each prompt: the sum over its spellings.

    One pass over each prompt, and one more for each beginning of a spelling of several tokens. ``batch``: prompts that
    are read together. Raises ValueError for a model that scores sequences."""
    ways = [way for own in labels.values() for way in own]
    begins = sorted({way[:n] for way in ways for n in range(len(way))}, key=lambda begin: (len(begin), begin))
    wanted = sorted({token for way in ways for token in way})
    column = {token: i for i, token in enumerate(wanted)}
    rows = [[*prompt, *begin] for prompt in prompts for begin in begins]
    found = _next(config, params, rows, wanted, batch, execution)
    made = []
    for number in range(len(prompts)):
        own = found[number * len(begins) : (number + 1) * len(begins)]
        at = {begin: own[i] for i, begin in enumerate(begins)}
        said = {way: math.fsum(at[way[:n]][column[way[n]]] for n in range(len(way))) for way in ways}
        made.append({label: _sum([_alone(way, said) for way in own]) for label, own in labels.items()})
    return made


def _alone(way: Spelling, said: Mapping[Spelling, float]) -> float:
    """The log-probability of a spelling that does not go on as a longer one."""
    longer = [other for other in said if len(other) > len(way) and other[: len(way)] == way]
    outer = [other for other in longer if not any(other != one and other[: len(one)] == one for one in longer)]
    rest = 1.0 - math.fsum(math.exp(said[other] - said[way]) for other in outer)
    return said[way] + math.log(rest) if rest > 0 else -math.inf


def _sum(logs: Sequence[float]) -> float:
    top = max(logs)
    return top if top == -math.inf else top + math.log(math.fsum(math.exp(one - top) for one in logs))


def _next(
    config: ModelConfig,
    params: tree.Params,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[int],
    batch: int,
    execution: Execution,
) -> np.ndarray:
    """float64[rows, wanted]: log-probabilities of the token after each row. Rows of like length are read together."""
    shards = mesh_.row_shards(execution.mesh)
    size = -(-min(batch, len(rows)) // shards) * shards
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = np.empty((len(rows), len(wanted)))
    ids = np.array(wanted, np.int32)
    for begin in range(0, len(order), size):
        some = order[begin : begin + size]
        longest = max(len(rows[i]) for i in some)
        step = max(64, 1 << max(longest.bit_length() - 3, 0))
        tokens_BT = np.zeros((size, -(-longest // step) * step), np.int32)
        last_B = np.zeros(size, np.int32)
        for at, i in enumerate(some):
            tokens_BT[at, : len(rows[i])] = rows[i]
            last_B[at] = len(rows[i]) - 1
        found = np.asarray(_after(config, execution, params, tokens_BT, last_B, ids), np.float64)
        out[some] = found[: len(some)]
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _after(
    config: ModelConfig, execution: Execution, params: tree.Params, tokens_BT: Any, last_B: Any, ids: Any
) -> jax.Array:
    hidden_BTD, _ = score.states(config, params, {"tokens": tokens_BT}, execution=execution)
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(heads.logits(config, heads.head_of(config, params), last_BD), axis=-1)[:, ids]
