"""Prompts and what was written to them as arrays: one sequence a row, right-padded to one width of few."""

from collections.abc import Sequence

import numpy as np

from jaxft.data.prompts import Prompt
from jaxft.rollout.generate import Completion

BLOCK = 16


def width(length: int, multiple: int = 1) -> int:
    """The width of rows that hold so many tokens: one of four between two powers of two, so that a run compiles its
    programs for a handful of them and pads by a quarter at most; a multiple of 16 and of ``multiple``."""
    step = max(BLOCK, 1 << max((length - 1).bit_length() - 3, 0))
    step = int(np.lcm(step, multiple))
    return -(-length // step) * step


def arrays(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    samples: int,
    pad_id: int,
    reserved: int = 0,
    multiple: int = 1,
) -> dict[str, np.ndarray]:
    """The sequences of a rollout, group after group, ``samples`` to each prompt.

    Args:
      prompts: that of each completion.
      reserved: positions before each sequence that are a learnt prompt's.

    Returns tokens, positions, segments (1, and 0 in padding) int32[N, T]; loss_mask bool[N, T], the completions with
    what ended them; sequence_mask bool[N, 1]; finished bool[N]; group int32[N]; sampler_logp float32[N, T], at each
    token's own place; and task_ids int32[N, T] where there are several tasks.
    """
    count = len(completions)
    lengths = [reserved + len(p.tokens) + len(c.tokens) for p, c in zip(prompts, completions, strict=True)]
    shape = (count, width(max(lengths), multiple))
    tokens, logp = np.full(shape, pad_id, np.int32), np.zeros(shape, np.float32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        begin = reserved + len(prompt.tokens)
        tokens[row, :begin] = [pad_id] * reserved + list(prompt.tokens)
        tokens[row, begin : lengths[row]] = completion.tokens
        logp[row, begin : lengths[row]] = completion.logp
    at, end = np.arange(shape[1]), np.array(lengths)[:, None]
    begins = np.array([[reserved + len(prompt.tokens)] for prompt in prompts])
    there = at < end
    tasks = np.array([[prompt.task] for prompt in prompts], np.int32)
    return {
        "tokens": tokens,
        "positions": np.where(there, at, 0).astype(np.int32),
        "segments": there.astype(np.int32),
        "loss_mask": there & (at >= begins),
        "sequence_mask": np.ones((count, 1), bool),
        "finished": np.array([completion.finished for completion in completions], bool),
        "group": (np.arange(count) // samples).astype(np.int32),
        "sampler_logp": logp,
        **({"task_ids": np.broadcast_to(tasks, shape).copy()} if tasks.any() else {}),
    }
