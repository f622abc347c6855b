"""Methods that train a slot: something of its own in the parameters, beside the model's weights.

A method is a config that inherits `Slotted` and makes the slot; where a slot enters the model is the decoder's affair.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax

from jaxft.core import tree
from jaxft.core.weight import Slot

PROMPT, PREFIX = "prompt", "prefix"


class Host(Protocol):
    """What a slot asks of a model besides its parameters."""

    @property
    def config(self) -> Any:
        """Sizes of the architecture, and `embed_scale`."""

    @property
    def tokenizer(self) -> Any:
        """Only read where a method begins with a text."""


@dataclass(frozen=True)
class Slotted:
    """The settings of every method that trains a slot."""

    tokens: int = 20
    """Length of the slot, in positions."""

    slot: ClassVar[str]
    """Where it lives: a `prompt` takes the first positions of every document, a `prefix` those before all of them."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"peft.tokens: got {self.tokens}; expected at least 1 position")

    def make(self, model: Host, params: tree.Params, key: jax.Array) -> Slot:
        """The slot to begin with."""
        raise NotImplementedError


def put(params: tree.Params, name: str, slot: Slot) -> tree.Params:
    """The parameters with a slot. Raises ValueError where there is one already."""
    if name in params:
        raise ValueError(f"peft: the model already has a {name} ({params[name]!r}); expected at most one of each kind")
    return {**params, name: slot}
