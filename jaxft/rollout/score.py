"""Scores: what a model says about a batch. The one function through which training sees a model.

``score(view, params, batch, key)`` runs the decoder and the chunked head and returns per-token values aligned with the
tokens: ``logp[b, t]`` is the log-probability of ``tokens[b, t]`` given what precedes it in its document, 0 for a
document's first token, for padding and for the positions of a prompt. A reward model, whose head is another, has one
score: ``reward[b, t]``, what it says of the document up to and with ``tokens[b, t]``.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.models import decoder, heads, slots, unfold
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.objectives.terms import Batch

Score = Callable[..., dict[str, jax.Array]]
REWARD = "reward"


def make_score(
    config: ModelConfig,
    needs: tuple[str, ...] = ("logp",),
    *,
    dtype: Any,
    execution: Execution = decoder.DEFAULT,
    neftune_alpha: float = 0.0,
    temperature: float = 1.0,
) -> Score:
    """Builds ``score(view, params, batch, key=None) -> {need: float32[B, T]}``.

    ``batch`` has tokens and may have positions and segments (without segments: one right-padded document per row), and
    ``task_ids`` for a multitask prompt.
    ``dtype`` is that of the computation. ``key=None`` is evaluation: no dropout, no noise. ``neftune_alpha`` adds
    uniform noise of magnitude alpha / sqrt(length * D) to the embeddings while training: Jain et al. 2023, alg. 1
    (arXiv:2310.05914). ``temperature`` divides the logits: scores are then of the distribution that is sampled from.
    """

    forward = make_forward(config, needs, dtype=dtype, execution=execution, temperature=temperature)

    def score(view: str, params: tree.Params, batch: Batch, key: jax.Array | None = None) -> dict[str, jax.Array]:
        del view  # every view of one model is scored alike
        params = tree.dropout_keys(params, dropout_key(key))
        return forward(params, batch, noise(config, neftune_alpha, batch, key, reserved_in(params, batch)))

    return score


def make_forward(
    config: ModelConfig, needs: tuple[str, ...], *, dtype: Any, execution: Execution, temperature: float = 1.0
) -> Callable[[tree.Params, Batch, jax.Array | None], dict[str, jax.Array]]:
    """``forward(params, batch, noise_BTD) -> {need: float32[B, T]}``: `make_score` with all that is random drawn."""

    def forward(params: tree.Params, batch: Batch, noise_BTD: jax.Array | None) -> dict[str, jax.Array]:
        params = tree.cast(params, dtype)
        hidden_BTD, _ = states(config, params, batch, noise_BTD, execution=execution)
        rewards = {REWARD: heads.rewards(config, params, hidden_BTD)} if REWARD in needs else {}
        if needs == (REWARD,):
            return rewards
        head, said = heads.head_of(config, params), tuple(need for need in needs if need != REWARD)
        how = {"mesh": execution.mesh, "temperature": temperature}
        out = heads.token_scores(config, head, hidden_BTD, predicted(batch["tokens"]), said, **how)
        return aligned(out, params, batch) | rewards

    return forward


def states(
    config: ModelConfig,
    params: tree.Params,
    batch: Batch,
    noise_BTD: jax.Array | None = None,
    *,
    execution: Execution,
    capture: tuple[str, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The hidden states [B, T, D] that the head reads, and those of `decoder.forward` that ``capture`` names."""
    hidden_BTD, _, captured = decoder.forward(
        config,
        params,
        batch["tokens"],
        positions(batch),
        batch.get("segments"),
        capture=capture,
        execution=execution,
        noise_BTD=noise_BTD,
        tasks_BT=batch.get("task_ids"),
        shared=unfold.of(batch),
    )
    return hidden_BTD, captured


def positions(batch: Batch) -> jax.Array:
    """int32[B, T]: those of the batch, or what stands for them."""
    given = batch.get("positions")
    return decoder.restarting(batch["tokens"], batch.get("segments")) if given is None else given


def predicted(x: jax.Array) -> jax.Array:
    """What belongs to each token, [B, T, ...], brought to the state that predicts it; the inverse of `aligned`."""
    return jnp.roll(x, -1, axis=1)


def aligned(out: dict[str, jax.Array], params: tree.Params, batch: Batch) -> dict[str, jax.Array]:
    """What is said of each state's next token, [B, T, ...], brought to that token; 0 where no token precedes it."""
    follows_BT = follows(batch["tokens"], batch.get("segments"))
    reserved = reserved_in(params, batch)
    if reserved:  # neither a position of the prompt nor the first after it is a token's that tokens precede
        follows_BT &= positions(batch) > reserved

    def one(x: jax.Array) -> jax.Array:
        keep = follows_BT.reshape(*follows_BT.shape, *[1] * (x.ndim - 2))
        return jnp.where(keep, jnp.roll(x, 1, axis=1), jnp.zeros((), x.dtype))

    return {name: one(x) for name, x in out.items()}


def dropout_key(key: jax.Array | None) -> jax.Array | None:
    """The key of a step's dropout, from the key of the step; None is evaluation."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(b"dropout"))


def reserved_in(params: tree.Params, batch: Batch) -> int:
    """Positions of each of the batch's documents that are a prompt's."""
    return slots.prompt_length(params) if "segments" in batch else 0


def noise(
    config: ModelConfig, alpha: float, batch: Batch, key: jax.Array | None, reserved: int = 0
) -> jax.Array | None:
    """A step's NEFTune noise [B, T, D]; None in evaluation, and for an ``alpha`` of 0.

    ``reserved``: see `reserved_in`; they do not count as the document's length."""
    if key is None or alpha == 0.0:
        return None
    lengths_BT = document_lengths(batch["tokens"], batch.get("positions"), batch.get("segments"))
    return neftune(key, alpha, lengths_BT - reserved, config.hidden_size)


def follows(tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """bool[B, T]: whether a token has a predecessor in its own document."""
    first_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]) == 0, tokens_BT.shape)
    if segments_BT is None:
        return ~first_BT
    return (segments_BT == jnp.roll(segments_BT, 1, axis=1)) & (segments_BT > 0) & ~first_BT


def make_room(tokens_BT: np.ndarray, segments_BT: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows with n positions for a prompt before every document, on the host.

    Returns (tokens, segments, index), the first two int32[B, W]; ``index`` int32[B, T] says where each token went."""
    B, T = tokens_BT.shape
    before_BT = np.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = (segments_BT > 0) & (segments_BT != before_BT)
    index_BT = np.arange(T) + n * np.cumsum(starts_BT, axis=1)
    width = T + n * int(starts_BT.sum(axis=1).max(initial=0))
    tokens_BW, segments_BW = np.zeros((B, width), np.int32), np.zeros((B, width), np.int32)
    np.put_along_axis(tokens_BW, index_BT, tokens_BT, axis=1)
    np.put_along_axis(segments_BW, index_BT, segments_BT, axis=1)
    rows, columns = np.nonzero(starts_BT)
    for back in range(1, n + 1):
        segments_BW[rows, index_BT[rows, columns] - back] = segments_BT[rows, columns]
    return tokens_BW, segments_BW, index_BT.astype(np.int32)


def document_lengths(tokens_BT: jax.Array, positions_BT: jax.Array | None, segments_BT: jax.Array | None) -> jax.Array:
    """int32[B, T]: the number of tokens of each token's own document, padding not counted where it can be told."""
    if segments_BT is not None:
        count = jax.vmap(lambda s: jnp.bincount(s, length=s.shape[0] + 1))(segments_BT)
        return jnp.take_along_axis(count, segments_BT, axis=1)
    if positions_BT is not None:
        return jnp.broadcast_to(jnp.max(positions_BT, axis=1, keepdims=True) + 1, tokens_BT.shape)
    return jnp.full(tokens_BT.shape, tokens_BT.shape[1], jnp.int32)


def neftune(key: jax.Array, alpha: float, lengths_BT: jax.Array, width: int) -> jax.Array:
    """Uniform noise [B, T, D] whose magnitude, alpha / sqrt(length * D), falls with the length of the document."""
    magnitude_BT1 = (alpha / jnp.sqrt(lengths_BT.astype(jnp.float32) * width))[..., None]
    noise_key = jax.random.fold_in(key, zlib.crc32(b"neftune"))
    return jax.random.uniform(noise_key, (*lengths_BT.shape, width), minval=-1.0, maxval=1.0) * magnitude_BT1
