"""New tokens for a model: its tokenizer, embedding, head and config grow together.

The rows of new tokens begin at the mean of the rows there are (Hewitt 2021, "Initializing New Word Embeddings
for Pretrained Language Models"), without the tiny noise that `transformers` adds: a run can be set up again exactly.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.weight import Weight
from jaxft.model import Model
from jaxft.peft.places import HEAD, TOKENS


def grow(model: Model, tokens: Sequence[str], multiple: int = 1) -> Model:
    """The model with ``tokens`` added to its vocabulary; the one given is left as it is.

    ``multiple``: the embedding's rows are padded to a multiple of it; rows that the checkpoint has to spare are used
    first. ``Model.new_tokens`` are the ids. Raises ValueError for a token that is known already, and for a model that
    has no tokenizer, or adapters."""
    if model.tokenizer is None:
        raise ValueError(f"{model.source}: the directory holds no tokenizer to add tokens to")
    tokenizer = copy.deepcopy(model.tokenizer)
    return _fitted(model, tokenizer, add(tokenizer, tokens), multiple)


def with_tokenizer(model: Model, tokenizer: Any, multiple: int = 1) -> Model:
    """The model with a tokenizer made from its own by adding tokens, as adapters bring one; else the model as it is.

    Rows that the checkpoint has to spare stay as they are: what was trained of them the adapter itself brings."""
    known, now = ({} if t is None else t.get_vocab() for t in (model.tokenizer, tokenizer))
    if not known or len(now) <= len(known) or any(now.get(token) != i for token, i in known.items()):
        return model
    return _fitted(
        model, tokenizer, tuple(sorted(i for token, i in now.items() if token not in known)), multiple, False
    )


def padded_with(model: Model, token: str | None) -> Model:
    """The model whose tokenizer fills up with ``token``; as it is for None. Raises ValueError for an unknown one."""
    if token is None or model.tokenizer is None:
        return model
    if token not in model.tokenizer.get_vocab():
        raise ValueError(
            f"model.pad_token: got {token!r}; expected a token of the vocabulary: name it in model.new_tokens too, or "
            "take one that no text holds"
        )
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.pad_token = token
    return dataclasses.replace(
        model, own_tokenizer=tokenizer, raw={**model.raw, "pad_token_id": tokenizer.pad_token_id}
    )


def add(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Adds tokens to a tokenizer in place; their ids. Raises ValueError for one that it has."""
    known = tokenizer.get_vocab()
    old = [token for token in tokens if not token.strip() or token in known or list(tokens).count(token) > 1]
    if old:
        remedy = "To train a token that exists, name it in peft.tokens of trainable_tokens."
        raise ValueError(f"model.new_tokens: got {old}; expected tokens that are not in the vocabulary. {remedy}")
    tokenizer.add_tokens(list(tokens))
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def _fitted(model: Model, tokenizer: Any, ids: tuple[int, ...], multiple: int, begin: bool = True) -> Model:
    if multiple < 1:
        raise ValueError(f"model.vocab_multiple: got {multiple}; expected at least 1")
    if tree.adapters(model.params):
        raise ValueError("grow: the parameters hold an adapter; grow the model first, then adapt it")
    held = [w for w in (tree.get(model.params, TOKENS), model.params.get(HEAD)) if isinstance(w, Weight)]
    if held:
        raise ValueError(f"grow: got a {type(held[0]).__name__}; expected a plain embedding and head to add rows to")
    rows = tree.get(model.params, TOKENS).shape[0]
    size = -(-max(rows, *(i + 1 for i in ids)) // multiple) * multiple
    fresh = ids if begin else ()
    params = tree.replace(model.params, TOKENS, _extended(tree.get(model.params, TOKENS), fresh, size))
    if HEAD in params:
        params = tree.replace(params, HEAD, _extended(params[HEAD].T, fresh, size).T)
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, vocab_size=size),
        params=params,
        raw={**model.raw, "vocab_size": size},
        own_tokenizer=tokenizer,
        new_tokens=ids,
    )


def _extended(rows: jax.Array, fresh: tuple[int, ...], size: int) -> jax.Array:
    """[size, features]: the mean of the rows that there are for those that are ``fresh``, and for those added."""
    mean = jnp.mean(rows, 0, dtype=jnp.float32).astype(rows.dtype)
    padded = jnp.concatenate([rows, jnp.broadcast_to(mean, (size - rows.shape[0], rows.shape[1]))])
    return padded.at[jnp.asarray(fresh, jnp.int32)].set(mean)
