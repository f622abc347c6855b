"""jaxft: fine-tune language models in JAX on TPUs and GPUs.

Importing the package is cheap: the names below, and the rooms (`jaxft.peft`, `jaxft.models`, ...), are imported when
first used, so that neither jax's backends nor transformers, datasets, grain or flax are touched before they are needed.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxft.core.align import stack_adapters as stack_adapters
    from jaxft.core.align import swap as swap
    from jaxft.core.many import for_rows as for_rows
    from jaxft.core.tree import combine as combine
    from jaxft.core.tree import merge as merge
    from jaxft.core.tree import partition as partition
    from jaxft.core.tree import strip as strip
    from jaxft.core.tree import trainable_mask as trainable_mask
    from jaxft.model import Model as Model
    from jaxft.model import load as load
    from jaxft.model import load_adapter as load_adapter
    from jaxft.model import save_adapter as save_adapter
    from jaxft.model import save_hf as save_hf
    from jaxft.scoring import reward_model as reward_model
    from jaxft.vocabulary import grow as grow

# public name -> the module that holds it
_NAMES = {
    "combine": "jaxft.core.tree",
    "for_rows": "jaxft.core.many",
    "grow": "jaxft.vocabulary",
    "merge": "jaxft.core.tree",
    "partition": "jaxft.core.tree",
    "stack_adapters": "jaxft.core.align",
    "strip": "jaxft.core.tree",
    "swap": "jaxft.core.align",
    "trainable_mask": "jaxft.core.tree",
    "Model": "jaxft.model",
    "load": "jaxft.model",
    "load_adapter": "jaxft.model",
    "save_adapter": "jaxft.model",
    "save_hf": "jaxft.model",
    "reward_model": "jaxft.scoring",
}
_ROOMS = (
    "core",
    "flax",
    "peft",
    "quant",
    "models",
    "sharding",
    "checkpoint",
    "data",
    "objectives",
    "rollout",
    "training",
)

__all__ = ["__version__", *_NAMES, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"jaxft.{name}")
    raise AttributeError(f"module 'jaxft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
