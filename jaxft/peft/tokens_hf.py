"""Trainable tokens in peft's format: ``M.trainable_tokens_delta`` [n, features], the rows themselves despite the name.

Beside a LoRA they are ``M.token_adapter.trainable_tokens_delta``, and the ids a field of its config. For a tied head
peft may store the embedding's rows once more.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Name, Names
from jaxft.core.weight import Weight
from jaxft.peft import disk, places, targets, trainable_tokens
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.formats import Alone, Fields
from jaxft.peft.trainable_tokens import TokensWeight

BESIDE, ROWS = "token_adapter.", "trainable_tokens_delta"
INDICES = "trainable_token_indices"


def export_beside(where: object, params: tree.Params, names: Names) -> tuple[Fields, Tensors, list[Weight]]:
    """The fields and tensors beside a LoRA, and the weights that they are of.

    Raises AdapterError for a tied head of its own that would follow the tokens in peft."""
    found = _found(params, names)
    if not found:
        return {}, {}, []
    ids = {name: _ids(w) for name, w in found}
    tied = places.tied(params) and found[0][0].path == places.TOKENS and not found[0][1].tied
    if tied and (len(found) == 1 or _ids(found[0][1]) == _ids(found[1][1])):
        got = "trained tokens of an embedding whose tied head has been replaced"
        raise AdapterError(where, got, "a head that follows them, or other tokens of its own")
    only = [name.path for name, _ in found] == [places.TOKENS]
    fields = {INDICES: next(iter(ids.values())) if only else {targets.ending(n, names): i for n, i in ids.items()}}
    return fields, {f"{n.module}.{BESIDE}{ROWS}": disk.host(w.rows) for n, w in found}, [w for _, w in found]


def export(params: tree.Params, names: Names, num_layers: int) -> tuple[Fields, Tensors, list[Weight]]:
    """The fields and tensors of trainable tokens alone; nothing where the embedding's and the head's differ."""
    del num_layers
    found = _found(params, names)
    ids = [_ids(w) for _, w in found]
    tied = [name for name in names if places.is_tied_head(params, name)]
    if not found or any(i != ids[0] for i in ids) or (tied and not found[0][1].tied):
        return {}, {}, []
    modules = [targets.ending(name, names) for name, _ in found]
    again = [(name, found[0][1]) for name in tied]  # peft stores a tied head's copy too
    tensors = {f"{name.module}.{ROWS}": disk.host(w.rows) for name, w in (*found, *again)}
    return {"token_indices": ids[0], "target_modules": modules, "init_weights": True}, tensors, [w for _, w in found]


def _found(params: tree.Params, names: Names) -> list[tuple[Name, TokensWeight]]:
    rows = [name for name in names if name.path in (places.TOKENS, places.HEAD)]
    held = [(name, places.get(params, name)) for name in rows]
    return [(name, w) for name, w in held if isinstance(w, TokensWeight)]


def _ids(w: TokensWeight) -> list[int]:
    return [int(i) for i in np.asarray(disk.host(w.ids))]


def restore_beside(where: object, config: Fields, tensors: Tensors, params: tree.Params, names: Names) -> tree.Params:
    """Trains the tokens that a LoRA's config lists."""
    wanted = config.get(INDICES)
    if not wanted:
        return params
    rows = {name.path: name for name in names}
    if not isinstance(wanted, dict):
        return _restore(where, tensors, params, rows, {places.TOKENS: wanted}, BESIDE)
    chosen = {}
    for target, ids in wanted.items():
        hits = [path for path in (places.TOKENS, places.HEAD) if targets.matches(rows[path].module, path, (target,))]
        if not hits:
            got = f"tokens of {target!r}"
            raise AdapterError(f"{where}: {INDICES}", got, "tokens of the embedding or the head of this model")
        chosen[hits[0]] = ids
    return _restore(where, tensors, params, rows, chosen, BESIDE)


def restore(where: object, config: Fields, tensors: Tensors, params: tree.Params, names: Names) -> tree.Params:
    """Trains the tokens of an adapter of its own."""
    rows = {name.path: name for name in names if name.path in (places.TOKENS, places.HEAD)}
    wanted = config.get("target_modules") or rows[places.TOKENS].module
    wanted = wanted if isinstance(wanted, str) else tuple(wanted)
    hits = [path for path, name in rows.items() if targets.matches(name.module, path, wanted)]
    if not hits:
        raise AdapterError(f"{where}: target_modules", repr(wanted), "the embedding or the head of this model")
    return _restore(where, tensors, params, rows, dict.fromkeys(hits, config.get("token_indices") or ()), "")


def _restore(
    where: object, tensors: Tensors, params: tree.Params, rows: dict[str, Name], chosen: dict[str, Any], infix: str
) -> tree.Params:
    """Trains the tokens ``chosen`` by path; with equal ones, in one order, a tied head follows its embedding."""
    tied = places.tied(params)
    head = chosen.get(places.HEAD)
    follows = places.TOKENS in chosen and (head is None or list(head) == list(chosen[places.TOKENS]))
    for path, ids in chosen.items():
        if tied and follows and path == places.HEAD:
            continue
        try:
            params = trainable_tokens.wrap(params, rows[path], ids, follows)
        except ValueError as error:
            remedy = "If tokens were added before training, add them to the base model first: jaxft.grow."
            raise AdapterError(where, str(error), "tokens of the base model", remedy) from None
        w = places.get(params, rows[path])
        array = disk.take(where, tensors, f"{rows[path].module}.{infix}{ROWS}", w.rows.shape, "the rows of its tokens")
        order = np.argsort(np.asarray(ids), kind="stable")
        params = places.put(params, rows[path], dataclasses.replace(w, rows=jnp.asarray(array[order])))
    if tied and follows:
        for extra in (infix, f"{infix}base_layer.", "base_layer."):
            tensors.pop(f"{rows[places.HEAD].module}.{extra}{ROWS}", None)
    return params


FORMAT = Alone(
    peft_type="TRAINABLE_TOKENS",
    fields=("token_indices", "target_modules", "init_weights"),
    export=export,
    restore=restore,
    saves=False,
)
