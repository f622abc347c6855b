"""A reward model from a language model: the same decoder with a head that scores, in place of the one that speaks.

It is stored as what `transformers` loads with AutoModelForSequenceClassification, whose score is read at the last token
that is not padding.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.model import Model
from jaxft.models import families
from jaxft.peft.places import HEAD, SCORE, TOKENS

# What AutoModelForSequenceClassification makes of a model_type.
ARCHITECTURES = {
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "gpt_neox": "GPTNeoXForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "olmo2": "Olmo2ForSequenceClassification",
    "phi3": "Phi3ForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "smollm3": "SmolLM3ForSequenceClassification",
}
Init = Literal["normal", "zeros"]


def reward_model(model: Model, key: jax.Array | None = None, *, init: Init = "normal") -> Model:
    """The model with a scalar head, ``params["score"]`` [D, 1], instead of its head over the vocabulary.

    ``init``: normal draws the head from ``key`` with the config's initializer_range, as `transformers` does; zeros
    makes every reward 0 at first. All else is shared, not copied; a reward model comes back as it is, with its padding
    token named. Raises ValueError
    for a family without such a class in `transformers`, a classifier of several labels, a model with adapters, and a
    tokenizer without a padding token."""
    if model.config.labels:
        check(model)
        known = model.raw.get("pad_token_id") is not None
        return model if known else dataclasses.replace(model, raw={**model.raw, "pad_token_id": padding(model)})
    family = model.config.family
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{model.source}: got a model of the family {family}, for which transformers has no sequence classifier; "
            f"expected one of {', '.join(ARCHITECTURES)}"
        )
    if tree.adapters(model.params):
        raise ValueError(
            "reward_model: the parameters hold an adapter; merge it first (jaxft.merge), then add the head"
        )
    if init == "normal" and key is None:
        raise ValueError("reward_model: init='normal' draws the head; give a key, jax.random.key(0), or init='zeros'")
    made = headed(model, key, init=init)
    raw = {name: value for name, value in model.raw.items() if name not in ("num_labels", "_num_labels")}
    raw |= {"architectures": [ARCHITECTURES[family]], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    raw |= {"problem_type": "regression", "pad_token_id": padding(model)}  # so that pipelines give the score as it is
    return dataclasses.replace(made, raw=raw, own_tokenizer=model.tokenizer)


def headed(model: Model, key: jax.Array | None = None, *, init: Init = "normal") -> Model:
    """`reward_model` of any family and tokenizer: a value model, which `transformers` need not know."""
    config, names = families.scoring(model.config, model.names, 1)
    dtype, shape = tree.get(model.params, TOKENS).dtype, (config.hidden_size, 1)
    head = jnp.zeros(shape, dtype)
    if init == "normal":
        head = (model.raw.get("initializer_range", 0.02) * jax.random.normal(key, shape)).astype(dtype)  # type: ignore[arg-type]
    params = {**{name: part for name, part in model.params.items() if name != HEAD}, SCORE: head}
    return dataclasses.replace(model, config=config, names=names, params=params)


def check(model: Model) -> None:
    """Raises ValueError for a model that gives no reward: one that speaks, or has several labels."""
    if model.config.labels != 1:
        held = f"{model.config.labels} labels" if model.config.labels else "a head over the vocabulary"
        raise ValueError(
            f"{model.source}: got a model with {held}; expected one output, the reward. Take the language model that "
            "it was made from, which is given such a head (jaxft.reward_model, objective.name=reward)"
        )


def padding(model: Model) -> int:
    """The id of the token that fills up rows. Raises ValueError where there is none."""
    found = model.raw.get("pad_token_id") if model.tokenizer is None else model.tokenizer.pad_token_id
    if found is None:
        raise ValueError(
            f"{model.source}: the tokenizer has no padding token, by which transformers finds the last token of a "
            "sequence; expected one that no text holds. Name it, model.pad_token='<|pad|>' (new ones also in "
            "model.new_tokens); in Python, model.tokenizer.pad_token = ..."
        )
    return found
