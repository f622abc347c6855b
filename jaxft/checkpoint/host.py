"""Arrays on any number of devices and hosts, seen from this host."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def visible(array: Any) -> bool:
    """Whether the whole array lies in this host's memory, so that looking at it copies nothing."""
    if not isinstance(array, jax.Array):
        return True
    return len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"


def gather(array: Any) -> np.ndarray:
    """The whole array in host memory; every process must take part if it is spread over several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
