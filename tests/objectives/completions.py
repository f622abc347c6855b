"""Pairs and labelled completions for tests: one a row as trl has them, and laid out as the loader lays them."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

LENGTH = 9
"""Tokens of a sequence as trl has it, padded on the right."""


@dataclass(frozen=True)
class Sequences:
    """N sequences, [N, LENGTH] each: log-probs are of the token itself given those before, as in the project."""

    logp: np.ndarray
    ref: np.ndarray
    sum_p2: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray
    real: np.ndarray
    completion: np.ndarray


def draw(count: int, seed: int = 0) -> Sequences:
    """Ragged sequences: a prompt of one to three tokens, then a completion of one to five."""
    rng = np.random.default_rng(seed)
    prompt, length = rng.integers(1, 4, (count, 1)), rng.integers(1, 6, (count, 1))
    at = np.arange(LENGTH)[None]
    logp, ref = (-rng.exponential(2.0, (count, LENGTH)).astype(np.float32) for _ in range(2))
    return Sequences(
        logp=np.where(at > 0, logp, 0.0).astype(np.float32),  # nothing precedes the first token
        ref=np.where(at > 0, ref, 0.0).astype(np.float32),
        sum_p2=rng.uniform(0.05, 0.9, logp.shape).astype(np.float32),
        entropy=rng.exponential(1.0, logp.shape).astype(np.float32),
        correct=rng.random(logp.shape) < 0.5,
        real=at < prompt + length,
        completion=(at >= prompt) & (at < prompt + length),
    )


def rows(given: Sequences, a_row: int = 2, pad: int = 3, room: int = 0) -> tuple[dict, dict]:
    """(scores, batch) with ``a_row`` sequences one after the other in a row and NaN wherever there is no token.

    ``pad`` more tokens and ``room`` more sequences, which do not exist, at the end of every row."""
    count = given.logp.shape[0] // a_row
    real = given.real.reshape(count, a_row, LENGTH)
    width = int(real.sum((1, 2)).max()) + pad

    def lay(x: np.ndarray, empty: float) -> np.ndarray:
        out = np.full((count, width), empty, np.asarray(x).dtype)
        for row, (values, keep) in enumerate(zip(x.reshape(count, a_row, LENGTH), real, strict=True)):
            out[row, : keep.sum()] = values[keep]
        return out

    number = np.broadcast_to(np.arange(a_row)[None, :, None] + 1, real.shape)
    scores = {
        "policy": {
            "logp": lay(given.logp, np.nan),
            "sum_p2": lay(given.sum_p2, np.nan),
            "entropy": lay(given.entropy, np.nan),
            "correct": lay(given.correct.astype(np.float32), np.nan),
        },
        "reference": {"logp": lay(given.ref, np.nan)},
    }
    batch = {
        "segments": lay(number.reshape(given.real.shape).astype(np.int32), 0),
        "loss_mask": lay(given.completion, False),
        "sequence_mask": np.arange(a_row + room)[None] < np.full((count, 1), a_row),
    }
    arrays = lambda tree: {k: arrays(v) if isinstance(v, Mapping) else jnp.asarray(v) for k, v in tree.items()}  # noqa: E731
    return arrays(scores), arrays(batch)


def back(gradient: np.ndarray, given: Sequences, a_row: int = 2) -> np.ndarray:
    """A gradient with respect to ``rows``' log-probs, [N, LENGTH] again; it must be 0 where there is no token."""
    out = np.zeros(given.real.shape, np.float32)
    for row, keep in enumerate(given.real.reshape(-1, a_row, LENGTH)):
        number = keep.sum()
        out.reshape(-1, a_row, LENGTH)[row][keep] = gradient[row, :number]
        assert not np.any(gradient[row, number:])
    return out
