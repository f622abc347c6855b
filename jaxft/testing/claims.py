"""Saying that something holds, or what was found instead."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree

SIMPLE = 1e-5
"""Tolerance of a few float32 operations, relative and absolute."""


class Broken(AssertionError):
    """A property that does not hold."""


def require(holds: Any, message: str) -> None:
    """Raises Broken unless it holds."""
    if not holds:
        raise Broken(message)


def arrays(params: Any) -> dict[str, Any]:
    """Every array by its path; of layers that are held apart each one."""
    return {tree.join(path): array for path, array in jax.tree_util.tree_flatten_with_path(params)[0]}


def same(got: Any, want: Any, what: str, tolerance: float = SIMPLE) -> None:
    """Raises Broken unless two trees have the same paths, shapes, dtypes, and values (tolerance 0: exactly)."""
    got, want = arrays(got), arrays(want)
    require(got.keys() == want.keys(), f"{what}: arrays {sorted(got)} instead of {sorted(want)}")
    for path, wanted in want.items():
        mine = got[path]
        require(
            (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype),
            f"{what}: {path} is {mine.dtype}{list(mine.shape)}, expected {wanted.dtype}{list(wanted.shape)}",
        )
        a, b = (
            np.asarray(v.astype(jnp.float32) if jnp.issubdtype(v.dtype, jnp.inexact) else v) for v in (mine, wanted)
        )
        off = np.abs(a - b) > tolerance + tolerance * np.abs(b) if a.dtype.kind == "f" else a != b
        off = off | (np.isnan(a) != np.isnan(b)) if a.dtype.kind == "f" else off
        worst = f"{np.max(np.abs(a - b), initial=0.0):.3g}"
        require(not off.any(), f"{what}: {path} differs in {off.sum()} of {a.size} numbers, by up to {worst}")


def _comparable(array: Any) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32)).astype(np.float64)
