"""Every method with everything else: each check of `jaxft.testing.model_checks` on each row of `METHODS`, unasked.

Packing, accumulation, rematerialisation, generation with a cache, a mesh, many adapters at once, merging.
"""

import dataclasses
import functools

import pytest

from jaxft import peft
from jaxft.peft import METHODS
from jaxft.testing import model_checks
from jaxft.testing.model_checks import Trial
from tests.peft.small import SMALL

LISTS = {
    "lora + ia3": (peft.LoRA(rank=2), METHODS["ia3"].config()),
}


@functools.lru_cache(maxsize=1)
def trial(name: str) -> Trial:
    if name in LISTS:
        return Trial(LISTS[name])
    return Trial(dataclasses.replace(METHODS[name].config(), **SMALL.get(name, {})), identity=name not in NEW)


NEW = {"houlsby", "pfeiffer", "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "multitask_prompt_tuning"}
"""Methods that are not the identity before training: prompts, prefixes, and bottlenecks drawn as AdapterHub does."""


NAMES = [*(name for name in METHODS if name != "adapter"), *LISTS]
"""All but an earlier adapter, which is on a disk."""


@pytest.mark.parametrize("check", model_checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)  # the slower of the two: what a trial compiles is used while it is at hand
def test_method(check, name):
    check(trial(name))
