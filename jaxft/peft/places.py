"""Where the weight of a module lies in our tree: behind a bias, or beside the embedding for a tied head.

A tied head has no array of its own, yet torch has a module for it, and peft adapts or retrains that module alone. Here
it is the ``head`` of an `Untied` embedding, [vocab, features], whose frozen part is the embedding's own buffer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Affine, Head, InPlace, Transposed, Untied, Weight

TOKENS, HEAD, SCORE = "embed/tokens", "head", "score"


def rows(names: Names) -> Names:
    """The names as peft sees them: with a row for the head, which a tied model's own names leave out.

    The head's module is lm_head in every model; gpt_neox only stores its tensor as embed_out. A model that scores
    sequences has another head, and none over the vocabulary."""
    paths = {name.path for name in names}
    if TOKENS not in paths or SCORE in paths:
        return names
    return (*(name for name in names if name.path != HEAD), Name(HEAD, "lm_head", "linear"))


def is_tied_head(params: tree.Params, name: Name) -> bool:
    """Whether this row is a head that the model computes with its embedding."""
    return name.path == HEAD and tied(params)


def tied(params: tree.Params) -> bool:
    """Whether the model's head over the vocabulary is its embedding."""
    return HEAD not in params and SCORE not in params


def head_follows(params: tree.Params, name: Name, ensure_weight_tying: bool) -> bool | None:
    """Whether the head tied to this weight follows what is trained; None if no head is tied to it."""
    if name.path != TOKENS or not tied(params):
        return None
    tokens = tree.get(params, TOKENS)
    if isinstance(tokens, Untied):
        return True if ensure_weight_tying and _reads_embedding(tokens.head) else None
    return ensure_weight_tying


def get(params: tree.Params, name: Name) -> Any:
    """The weight of a row without its bias, or trained whole with it; None for a tied head that is only tied.

    An adapted tied head is given as the [features, vocab] weight it is to peft, one trained whole as [vocab, features].
    """
    if is_tied_head(params, name):
        tokens = tree.get(params, TOKENS)
        head = tokens.head if isinstance(tokens, Untied) else None
        return head.base if isinstance(head, Head) else head
    w = tree.get(params, name.path)
    return w.base if _around(w) else w


def _around(w: Any) -> bool:
    """Whether a weight is only the bias, or the head, around the one that a row means."""
    return isinstance(w, Affine | Untied) and not w.adapter


def sizes(params: tree.Params, name: Name) -> tuple[int, int]:
    """(in, out) of one layer of a row's weight."""
    if is_tied_head(params, name):
        vocab, features = tree.get(params, TOKENS).shape
        return features, vocab
    rows, columns = tree.get(params, name.path).shape[-2:]
    return rows, columns


def wrap(params: tree.Params, name: Name, fn: Callable[[Any], Any], outside: bool = False) -> tree.Params:
    """Replaces the weight of a row by ``fn(weight)``: inside a bias, or around it if ``outside``; a tied head is handed
    to ``fn`` as a [features, vocab] weight."""
    if not is_tied_head(params, name):
        if outside:
            return tree.replace(params, name.path, fn(tree.get(params, name.path)))
        return tree.wrap(params, name.path, fn)
    head = _head(params)
    return _put_head(params, Head(fn(head.base if isinstance(head, Head) else Transposed(head))))


def wrap_head(params: tree.Params, fn: Callable[[Any], Any]) -> tree.Params:
    """Replaces a tied head, [vocab, features], by ``fn(weight)``."""
    return _put_head(params, fn(_head(params)))


def _head(params: tree.Params) -> Any:
    """A tied head as it is: the embedding's own array, or what has taken its place."""
    tokens = tree.get(params, TOKENS)
    return tokens.head if isinstance(tokens, Untied) else tree.strip(tokens)


def _put_head(params: tree.Params, head: Any) -> tree.Params:
    """Puts a head beside the embedding; an adapter of the look-up keeps in mind only one that reads the embedding."""
    tokens = tree.get(params, TOKENS)
    lookup = tokens.base if isinstance(tokens, Untied) else tokens
    adapts = isinstance(lookup, Weight) and lookup.adapter
    if adapts and not (lookup.tied and _reads_embedding(head)):
        lookup = dataclasses.replace(lookup, tied=None)  # type: ignore[type-var]
    return tree.replace(params, TOKENS, Untied(lookup, head))


def _reads_embedding(head: Any) -> bool:
    """Whether an adapted head stands on the embedding itself, and not on a matrix of its own."""
    if type(head) is Transposed:
        return not (isinstance(head.base, Weight) and head.base.adapter)
    adapted = isinstance(head, Weight) and (isinstance(head, Head) or head.adapter) and not isinstance(head, InPlace)
    return adapted and _reads_embedding(head.base)


def put(params: tree.Params, name: Name, weight: Any) -> tree.Params:
    """Replaces what `get` returned."""
    if is_tied_head(params, name):
        tokens = tree.get(params, TOKENS)
        head = Head(weight) if isinstance(tokens.head, Head) else weight
        return tree.replace(params, TOKENS, dataclasses.replace(tokens, head=head))
    w = tree.get(params, name.path)
    return tree.replace(params, name.path, dataclasses.replace(w, base=weight) if _around(w) else weight)


def follows(params: tree.Params, names: Names) -> bool:
    """Whether a tied head follows a trained or adapted embedding."""
    w = next((get(params, name) for name in names if name.path == TOKENS), None)
    return isinstance(w, Weight) and w.adapter and w.tied is True
