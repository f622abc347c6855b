"""One row of the parity matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A method here and in peft with the same settings, and the tiny models (`tests.models.tiny`) they meet on."""

    ours: Any
    """Config of the method here."""
    theirs: Callable[[], Any]
    """Makes peft's config."""
    models: tuple[str, ...] = ("llama", "llama_tied", "qwen2", "gpt2")
    mergeable: bool = True
    """Whether the adapted weight is a plain weight as well."""
    copies: str | None = None
    """Names, as a regex, of tensors that peft writes again for every module and warns of where they are missing."""
