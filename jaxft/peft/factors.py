"""The two factors of a low-rank matrix as LyCORIS draws them, layers with ranks of their own padded to the largest."""

import jax
import numpy as np


def pair(key: jax.Array, rows: int, columns: int, ranks: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """float32 A [*stack, rows, R] uniform within 1/sqrt(rows) and B [*stack, R, columns] uniform within 1/sqrt(rank).

    ranks: int[*stack], of which R is the largest; both are zero beyond a layer's rank."""
    one, two = jax.random.split(key)
    width = int(ranks.max())
    real = np.arange(width) < ranks[..., None]  # bool[*stack, R]
    a = jax.random.uniform(one, (*ranks.shape, rows, width), minval=-1.0, maxval=1.0)
    b = jax.random.uniform(two, (*ranks.shape, width, columns), minval=-1.0, maxval=1.0)
    a_bound, b_bound = real / np.sqrt(rows), real / np.sqrt(np.maximum(ranks, 1))[..., None]
    return a * a_bound[..., None, :].astype(np.float32), b * b_bound[..., None].astype(np.float32)
