"""A copy of a model that computes the same and whose activations have outlier channels, as those of large models have.

`python -m scripts.tiny.outliers assets/tiny --out runs/tiny_outliers`

A few channels of what the norms give the linear layers, and of what ``down_proj`` is given, are multiplied by a factor,
and the rows of the weights that read them divided by it. The factor is a power of two, so nothing is rounded: in
floating point the copy computes the very same numbers.
"""

import argparse
import math
from pathlib import Path

import numpy as np

import jaxft
from jaxft.core import tree

FACTOR, CHANNELS = 64.0, 4
PLACES = (
    ("attn_norm/scale", ("attn/q", "attn/k", "attn/v")),
    ("mlp_norm/scale", ("mlp/gate", "mlp/up")),
    ("mlp/up", ("mlp/down",)),
)
"""In a layer of a llama: what is multiplied along its last axis, and what reads it."""


def plant(
    params: tree.Params, channels: int = CHANNELS, factor: float = FACTOR, seed: int = 0
) -> tuple[tree.Params, dict[str, np.ndarray]]:
    """The parameters with ``channels`` outliers at each of `PLACES`, the same in every layer, and which they are.

    Raises ValueError for a factor that is no power of two."""
    if factor <= 0 or math.frexp(factor)[0] != 0.5:
        raise ValueError(f"factor: got {factor}; expected a power of two, by which nothing is rounded")
    draws, chosen = np.random.default_rng(seed), {}
    for writer, readers in PLACES:
        path = f"layers/{writer}"
        w = tree.get(params, path)
        at = chosen[path] = np.sort(draws.choice(w.shape[-1], channels, replace=False))
        params = tree.replace(params, path, w.at[..., at].multiply(factor))
        for reader in readers:
            w = tree.get(params, f"layers/{reader}")
            params = tree.replace(params, f"layers/{reader}", w.at[..., at, :].divide(factor))
    return params, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a llama")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--channels", type=int, default=CHANNELS, help=f"at each place; default: {CHANNELS}")
    parser.add_argument("--factor", type=float, default=FACTOR, help=f"a power of two; default: {FACTOR:g}")
    args = parser.parse_args()
    model = jaxft.load(args.model, dtype="auto")
    params, chosen = plant(model.params, args.channels, args.factor)
    print(f"Wrote {jaxft.save_hf(model, params, args.out)}")
    for path, at in chosen.items():
        print(f"{path}: channels {', '.join(map(str, at))} times {args.factor:g}")


if __name__ == "__main__":
    main()
