r"""Prompt tuning: n learnt rows in front of the embeddings of every document; the model itself is frozen.

.. math:: h_0 = [P; E(x)], \qquad P \in \mathbb{R}^{n \times D}

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2 (arXiv:2104.08691). It trains
n D parameters.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxft.core import tree, verbs
from jaxft.core.weight import Slot, trainable, weight
from jaxft.peft import slot_formats, slots
from jaxft.peft.slot_formats import ROWS, SlotFormat
from jaxft.peft.slots import Host, Slotted


@dataclass(frozen=True)
class PromptTuning(Slotted):
    """A learnt prompt before every document. Default learning rate 3e-2."""

    init: Literal["sample_vocab", "text", "random"] = "sample_vocab"
    """Rows to begin with: of tokens drawn from the vocabulary; of the tokens of `init_text`, cut or repeated to length;
    or standard normal (peft's default, far from any token and slow to learn)."""
    init_text: str = ""
    """The text of `init: text`; a description of the task is a good one."""

    slot: ClassVar[str] = slots.PROMPT

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init == "text") != bool(self.init_text):
            raise ValueError(f"peft.init_text: got {self.init_text!r} with init={self.init}; expected both or neither")

    def make(self, model: Host, params: tree.Params, key: jax.Array) -> Slot:
        return Prompt(initial(self, model, params, key))


@weight
class Prompt(Slot):
    """The rows themselves. value: float32[n, D]."""

    value: jax.Array = trainable()

    @property
    def shape(self):
        return (1, *self.value.shape)

    def dense(self):
        return self.value[None]


def initial(config: PromptTuning, model: Host, params: tree.Params, key: jax.Array) -> jax.Array:
    """The rows to begin with, float32[n, D], as the look-up of tokens gives them."""
    vocab, features = params["embed"]["tokens"].shape
    if config.init == "random":
        return jax.random.normal(key, (config.tokens, features))
    if config.init == "text":
        ids = jnp.asarray(repeated(_tokenised(model, config.init_text), config.tokens), jnp.int32)
    else:
        ids = jax.random.randint(key, (config.tokens,), 0, vocab)
    return verbs.take(params["embed"]["tokens"], ids).astype(jnp.float32) * model.config.embed_scale


def _tokenised(model: Host, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("peft.init_text: the model has no tokenizer to read it with; expected one beside its weights")
    return model.tokenizer(text)["input_ids"]


def repeated(ids: Sequence[int], length: int) -> list[int]:
    """The ids cut, or repeated over and over, to ``length``."""
    return list(itertools.islice(itertools.cycle(ids), length))


INITS = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")

FORMAT = SlotFormat(
    peft_type="PROMPT_TUNING",
    leaf=Prompt,
    place=slots.PROMPT,
    own=INITS,
    shapes=lambda config, params: {ROWS: (config.get("num_virtual_tokens"), slot_formats.features(params))},
    write=lambda w: ({"prompt_tuning_init": "RANDOM", "token_dim": w.value.shape[-1]}, {ROWS: w.value}),
    read=lambda config, tensors: Prompt(tensors[ROWS]),
)
