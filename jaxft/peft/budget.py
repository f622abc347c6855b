"""Methods at matched sizes: which setting of a method sets its number of parameters, and the value that fits a budget.

Counts come from shapes alone; nothing is allocated.
"""

import dataclasses
import math
from typing import Any

import jax

from jaxft import peft
from jaxft.core import tree

SIZED_BY: dict[str, str] = {
    "lora": "rank",
    "lora_fa": "rank",
    "dora": "rank",
    "adalora": "init_rank",
    "houlsby": "reduction_factor",
    "pfeiffer": "reduction_factor",
    "parallel": "reduction_factor",
    "loha": "rank",
    "lokr": "rank",
    "randlora": "rank",
    "fourierft": "frequencies",
    "shira": "rank",
    "miss": "rank",
    "oft": "block_size",
    "boft": "block_size",
    "hra": "rank",
    "prefix_tuning": "tokens",
    "p_tuning_v2": "tokens",
}
"""The setting that scales each method; one that is not here has the size it has, or grows a prompt out of reason. A
method from outside the package is scaled by its ``rank``, if it has one."""

VALUES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)


class _Of:
    """The model with other parameters."""

    def __init__(self, model: Any, params: tree.Params):
        self.model, self.params = model, params

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def count(model: Any, config: Any) -> int:
    """Trained parameters of a method on a model (arrays or shapes). Raises ValueError where it does not fit it."""

    def trained(params: tree.Params) -> tree.Params:
        adapted, mask, _ = peft.adapt_for_training(_Of(model, params), jax.random.key(0), [config])
        return tree.partition(adapted, mask)[0]

    return tree.count(jax.eval_shape(trained, model.params))


def fit(model: Any, name: str, config: Any, budget: int) -> tuple[Any, int]:
    """The config with its size set so that its parameters come nearest (by ratio) to the budget, and their number.

    A method without such a setting, or of a size that was not asked for, is returned as it is."""
    own = "rank" if name not in peft.METHODS and "rank" in {f.name for f in dataclasses.fields(config)} else None
    field = SIZED_BY.get(name, own)
    if field is None:
        return config, count(model, config)
    best: tuple[float, Any, int] | None = None
    for value in VALUES:
        try:
            trial = dataclasses.replace(config, **{field: value})
            found = count(model, trial)
        except ValueError:  # a size that does not fit this model
            continue
        distance = abs(math.log(found / budget))
        if best is None or distance < best[0]:
            best = (distance, trial, found)
    if best is None:
        raise ValueError(f"peft.{field}: no value from {VALUES[0]} to {VALUES[-1]} fits this model")
    return best[1], best[2]
