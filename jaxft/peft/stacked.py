"""An adapter that was trained before, as one of the methods of a run: to train others on it, or to train it on.

Frozen, its arrays get no gradients and no optimiser state. What the run saves holds it all the same, so that the result
stands alone: in peft's format where nothing was added to it, else in our own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.peft import disk
from jaxft.peft.slots import PROMPT


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An earlier adapter. Default learning rate: that of the method that made it."""

    path: str = ""
    """Its folder, such as runs/first/adapter; must be given."""
    frozen: bool = True
    """Whether it stays as it is; otherwise it trains on from where it was."""


def adapt(params: tree.Params, names: Names, key: jax.Array, config: Adapter) -> tree.Params:
    """The parameters with the adapter on them. Raises AdapterError, and ValueError for a prompt."""
    from jaxft.peft import store  # reads every method's format, and so comes after the table of methods

    del key
    if not config.path:
        raise ValueError("peft.path: got none; expected the folder of an adapter, such as runs/first/adapter")
    found = store.load(params, names, tree.num_layers(params), config.path)
    if PROMPT in found and PROMPT not in params:
        # the data keep no positions free for it: only a prompt among the methods says how many
        raise ValueError(f"peft.path: {config.path} is a prompt; expected an adapter that takes no positions of a text")
    return found


def is_frozen(config: Any) -> bool:
    """Whether a method trains nothing."""
    return isinstance(config, Adapter) and config.frozen


def methods_of(config: Adapter) -> list[str]:
    """Names of the methods that made it, as far as its files tell."""
    from jaxft.peft import hf, native

    where = Path(config.path).expanduser().absolute()
    made: dict[str, Any] = json.loads((where / disk.CONFIG).read_text(encoding="utf-8"))
    if made.get("peft_type") == native.PEFT_TYPE:
        return [method["method"] for method in made.get("methods", ()) if "method" in method]
    return [hf.format_named(where, made)[0]]
