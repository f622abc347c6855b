"""Every method with everything else: each check of `jaxft.testing.model_checks` on each row of `METHODS`, unasked.

Packing, accumulation, rematerialisation, generation with a cache, a mesh, many adapters at once, merging.
"""

import dataclasses
import functools
from typing import Any

import pytest

from jaxft import peft
from jaxft.peft import METHODS
from jaxft.testing import model_checks
from jaxft.testing.model_checks import Trial

SMALL: dict[str, dict[str, Any]] = {
    "full": {"select": "norms"},
    "last_layers": {"n": 1},
    "trainable_tokens": {"tokens": (3, 5, 8), "head": True},
    "road": {"group_size": 16},
    "vera": {"rank": 16},
    "randlora": {"rank": 12, "alpha": 12},
    "fourierft": {"frequencies": 20},
    "shira": {"rank": 4},
    "miss": {"rank": 12},
}
"""Settings that fit a decoder of 32 features; the defaults otherwise."""
LISTS = {
    "lora + ia3": (peft.LoRA(rank=2), METHODS["ia3"].config()),
}


@functools.cache
def trial(name: str) -> Trial:
    if name in LISTS:
        return Trial(LISTS[name])
    return Trial(dataclasses.replace(METHODS[name].config(), **SMALL.get(name, {})), identity=name not in NEW)


NEW = {"houlsby", "pfeiffer", "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "multitask_prompt_tuning"}
"""Methods that are not the identity before training: prompts, prefixes, and bottlenecks drawn as AdapterHub does."""


NAMES = [*(name for name in METHODS if name != "adapter"), *LISTS]
"""All but an earlier adapter, which is on a disk."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", model_checks.CHECKS, ids=lambda check: check.__name__)
def test_method(check, name):
    check(trial(name))
