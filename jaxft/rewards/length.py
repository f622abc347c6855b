"""How long a completion is and how much it repeats itself, counted in tokens (column `completion_ids`)."""

import math as math_
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.rewards import math, settings
from jaxft.rewards.math import Grading
from jaxft.rewards.settings import Function, Weighted

IDS = "completion_ids"


@dataclass(frozen=True, kw_only=True)
class SoftOverlong(Weighted):
    """A growing penalty on completions near the greatest length."""

    max_tokens: int
    """Length above which the reward is -1: rollout.max_new_tokens, as a rule."""
    cache: int
    """Tokens below max_tokens over which the reward falls from 0 to -1. 0: it falls at once."""

    def __post_init__(self) -> None:
        if not 0 <= self.cache <= self.max_tokens:
            raise ValueError(f"cache: got {self.cache}; expected from 0 to max_tokens, {self.max_tokens}")


def overlong(config: SoftOverlong) -> Function:
    r"""Yu et al. 2025, DAPO, eq. 13 (arXiv:2503.14476), of a completion of n tokens:

    .. math:: R = 0 \text{ for } n \le L - C, \quad (L - C - n) / C \text{ up to } n = L, \quad -1 \text{ above}"""
    free = config.max_tokens - config.cache

    def soft_overlong(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        del prompts, completions
        lengths = [len(ids) for ids in settings.column(columns, IDS, "soft_overlong")]
        return [0.0 if n <= free else -1.0 if n > config.max_tokens else (free - n) / config.cache for n in lengths]

    return soft_overlong


@dataclass(frozen=True, kw_only=True)
class Repetition(Weighted):
    """A penalty on completions that repeat themselves."""

    ngram: int = 3
    """Tokens of the pieces that are compared."""
    max_penalty: float = -1.0
    """Reward, at most 0, that is approached where all pieces are the same."""

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram: got {self.ngram}; expected at least 1")
        if self.max_penalty > 0:
            raise ValueError(f"max_penalty: got {self.max_penalty}; expected at most 0")


def repetition(config: Repetition) -> Function:
    r"""Yeo et al. 2025, app. C.2 (arXiv:2502.03373): :math:`p (1 - \text{different n-grams} / \text{n-grams})`, and 0
    for a completion that is shorter than one."""

    def penalty(ids: Sequence[int]) -> float:
        pieces = [tuple(ids[i : i + config.ngram]) for i in range(len(ids) - config.ngram + 1)]
        return config.max_penalty * (1 - len({*pieces}) / len(pieces)) if pieces else 0.0

    def repetition(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        del prompts, completions
        return [penalty(ids) for ids in settings.column(columns, IDS, "repetition")]

    return repetition


@dataclass(frozen=True, kw_only=True)
class CosineLength(Grading, Weighted):
    """Whether a mathematical answer is right, and how short: right ones the better, and wrong ones the worse, the
    shorter they are."""

    max_tokens: int
    """Length from which on the reward no longer changes."""
    shortest_right: float = 1.0
    """Reward of a right answer of no length."""
    longest_right: float = 0.5
    """Reward of a right answer of max_tokens."""
    shortest_wrong: float = -1.0
    """Reward of a wrong answer of no length."""
    longest_wrong: float = -0.5
    """Reward of a wrong answer of max_tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}; expected at least 1")


def cosine(config: CosineLength) -> Function:
    r"""Yeo et al. 2025, app. C.1 (arXiv:2502.03373), of n tokens, between the rewards of the shortest and longest:

    .. math:: R = R_\text{long} + \tfrac{1}{2} (R_\text{short} - R_\text{long})
              (1 + \cos(\pi \min(n / L, 1)))"""
    graded = math.grader(config)

    def cosine_length(
        prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        found: list[float | None] = []
        lengths = map(len, settings.column(columns, IDS, "cosine_length"))
        for right, length in zip(graded(prompts, completions, **columns), lengths, strict=True):
            high, low = (
                (config.shortest_right, config.longest_right)
                if right
                else (config.shortest_wrong, config.longest_wrong)
            )
            share = (1 + math_.cos(math_.pi * min(length / config.max_tokens, 1.0))) / 2
            found.append(None if right is None else low + (high - low) * share)
        return found

    return cosine_length
