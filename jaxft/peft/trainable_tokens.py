r"""Trainable tokens: the vectors of some tokens train, the rest of the embedding does not.

.. math:: E'_v = r_v \ \text{ for chosen tokens } v, \qquad E'_v = E_v \ \text{ otherwise}

peft's TRAINABLE_TOKENS, and ``trainable_token_indices`` beside a LoRA (there is no paper). The rows replace those of
the embedding, from which they begin; a tied head follows, an untied one has rows of its own if asked for. n tokens of a
model of width D train n D parameters, 2 n D with an untied head.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree, verbs
from jaxft.core.names import Names
from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft import places


@dataclass(frozen=True, kw_only=True)
class TrainableTokens:
    """Tokens whose vectors train. Default learning rate 1e-3."""

    tokens: tuple[int | str, ...] = ()
    """The tokens, as ids or as text; default: those that the model was given (model.new_tokens)."""
    head: bool = False
    """Whether the same rows of an untied head train too; a tied head always follows."""

    def __post_init__(self) -> None:
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"peft.tokens: got {list(self.tokens)}; expected each token once")


def settle(config: TrainableTokens, model: Any) -> TrainableTokens:
    """The config with ids alone. Raises ValueError for a text that is no single token, and where there is no token."""
    tokens: Sequence[int | str] = config.tokens or getattr(model, "new_tokens", ())
    if not tokens:
        raise ValueError("peft.tokens: got none; expected token ids, tokens as text, or new ones by model.new_tokens")
    known = model.tokenizer.get_vocab() if any(isinstance(token, str) for token in tokens) else {}
    unknown = [token for token in tokens if isinstance(token, str) and token not in known]
    if unknown:
        remedy = "Add new ones with model.new_tokens (jaxft.grow)."
        raise ValueError(
            f"peft.tokens: {', '.join(map(repr, unknown))} is no single token of this vocabulary. {remedy}"
        )
    return dataclasses.replace(config, tokens=tuple(known[t] if isinstance(t, str) else t for t in tokens))


def adapt(params: tree.Params, names: Names, key: jax.Array, config: TrainableTokens) -> tree.Params:
    """Trains the rows of the embedding (and head). Raises ValueError for ids that the vocabulary does not have."""
    del key
    rows = {name.path: name for name in places.rows(names)}
    params = wrap(params, rows[places.TOKENS], config.tokens)
    return wrap(params, rows[places.HEAD], config.tokens) if config.head and places.HEAD in params else params


def wrap(params: tree.Params, name: Any, tokens: Sequence[Any], follows: bool = True) -> tree.Params:
    """Trains the tokens of the embedding or of the head; ``follows``: a tied head goes with its embedding."""
    ids = sorted(tokens)
    size = places.sizes(params, name)[0 if name.path == places.TOKENS else 1]
    if not ids or ids[0] < 0 or ids[-1] >= size:
        wrong = [i for i in ids if not 0 <= i < size]
        raise ValueError(f"peft.tokens: got {wrong}; expected ids from 0 to {size - 1}, the rows of {name.module}")
    tied = places.head_follows(params, name, follows)
    lookup = name.path == places.TOKENS

    def trained(base: Any) -> TokensWeight:
        at = jnp.asarray(ids, jnp.int32)
        return TokensWeight(base, _rows(base, at, lookup).astype(jnp.float32), at, lookup, tied)

    return places.wrap(params, name, trained)


@weight
class TokensWeight(Weight):
    """An embedding (``lookup``, [vocab, features]) or head ([features, vocab]) with the vectors of ``ids`` replaced.

    rows: [*stack, n, features]; ids: int32[*stack, n], ascending. ``tied``: as in InPlace.
    """

    base: Any = parameter()
    rows: jax.Array = trainable()
    ids: jax.Array
    lookup: bool = static(default=True)
    tied: bool | None = static(default=None)

    @property
    def adapted(self):
        return jnp.ones(self.shape[:-2], bool)

    def off(self):
        rows = _each(lambda w: _rows(w.base, w.ids, w.lookup), self)
        return dataclasses.replace(self, rows=rows.astype(jnp.float32))

    def _logits(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return y.at[..., self.ids].set(x @ self.rows.astype(x.dtype).T)

    def __rmatmul__(self, x):
        y = x @ self.base
        if not self.lookup:
            return self._logits(y, x)
        change = self.rows.astype(x.dtype) - _rows(self.base, self.ids, True).astype(x.dtype)
        return y + x[..., self.ids] @ change

    def take(self, ids):
        at = jnp.minimum(jnp.searchsorted(self.ids, ids), self.ids.size - 1)
        rows = verbs.take(self.base, ids)
        return jnp.where((self.ids[at] == ids)[..., None], self.rows[at].astype(rows.dtype), rows)

    def unembed(self, x):
        y = verbs.unembed(self.base, x)
        return self._logits(y, x) if self.tied else y

    def dense(self):
        def one(w: TokensWeight) -> jax.Array:
            base, rows = verbs.dense(w.base), w.rows.astype(w.dtype)
            return base.at[w.ids].set(rows) if w.lookup else base.at[:, w.ids].set(rows.T)

        return _each(one, self)

    def axes(self, names):
        features = names[-1] if self.lookup else names[-2]
        return {"base": names, "rows": (*names[:-2], None, features), "ids": (*names[:-2], None)}


def _each(fn: Any, w: TokensWeight) -> jax.Array:
    """``fn`` of every layer of a stack."""
    return fn(w) if len(w.shape) == 2 else jax.vmap(lambda layer: _each(fn, layer))(w)


def _rows(base: Any, ids: jax.Array, lookup: bool) -> jax.Array:
    """The vectors of ``ids``, [n, features]."""
    return verbs.take(base, ids) if lookup else verbs.dense(base)[:, ids].T
