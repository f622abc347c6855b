"""Quantising a model with calibration data, layer by layer, each seeing what the layers before it have become.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, section 4: the Hessian of a matrix is that of its inputs in the
model whose earlier matrices are quantised already, within a layer too. Its sum x x^T comes from a `Tap` (`core.tap`),
exact and for all positions that count; nothing flows back through the layer, as no cotangent enters it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tap, tree
from jaxft.core.names import Name
from jaxft.core.tap import Tap
from jaxft.core.weight import Affine, Shared
from jaxft.model import Model
from jaxft.models import decoder
from jaxft.models.config import Layer, ModelConfig
from jaxft.peft import calibration
from jaxft.quant import QuantConfig
from jaxft.quant import gptq as gptq_

Batch = Mapping[str, Any]
STEPS = (("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up"), ("down",))
"""Matrices of a layer that read the same, in the order in which one feeds the next."""


def gptq(
    model: Model,
    batches: Iterable[Batch],
    config: QuantConfig,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> tree.Params:
    """The model's parameters with the matrices that ``config`` picks in groups of integers, by GPTQ.

    ``batches`` have tokens int32[B, T] and may have segments and positions, like those of training; the activations of
    all of them, [rows, T, D], are held on the device. ``tell(done, of)`` is called after each layer. Raises ValueError
    naming the weight that does not fit, and where there is nothing to measure."""
    picked = config.picked(model.names)
    rows = [{name: jnp.asarray(array) for name, array in batch.items()} for batch in batches]
    if not any(bool(jnp.any(calibration.counted(batch, False))) for batch in rows):
        raise ValueError("gptq: got no position that counts; expected batches of tokens that are not all padding")
    streams = [_begin(model.config, model.params, batch) for batch in rows]
    made: dict[str, list[Any]] = {name.path: [] for name in picked}
    for i, kind in enumerate(model.config.layers):
        params = tree.layer(model.params["layers"], i)
        for names in _steps(picked):
            paths = tuple(name.path.removeprefix("layers/") for name in names)
            sums: Any = None
            for batch, x_BTD in zip(rows, streams, strict=True):
                grams = _grams(model.config, kind, paths, params, x_BTD, batch)
                sums = grams if sums is None else jax.tree.map(jnp.add, sums, grams)
            for name, path in zip(names, paths, strict=True):
                matrix = tree.get(params, path)
                matrix = matrix.base if isinstance(matrix, Affine) else matrix
                try:
                    w = gptq_.quantize(matrix, sums[path], config.gptq, config.block_size, config.symmetric)
                except ValueError as error:
                    raise ValueError(f"{name.module.format(i)}: {error}") from None
                params = tree.wrap(params, path, lambda _, w=w: w)
                made[name.path].append(w)
        streams = [_onward(model.config, kind, params, *both) for both in zip(streams, rows, strict=True)]
        tell(i + 1, model.config.num_layers)
    params = model.params
    for path, layers in made.items():
        whole = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
        params = tree.wrap(params, path, lambda _, w=whole: w)
    return params


def _steps(picked: list[Name]) -> list[list[Name]]:
    """The matrices to be measured together, in order; what is in no row of `STEPS` by itself."""
    last = {name.path: name.path.rpartition("/")[2] for name in picked}
    known = [[name for name in picked if last[name.path] in step] for step in STEPS]
    others = [[name] for name in picked if not any(last[name.path] in step for step in STEPS)]
    return [step for step in (*known, *others) if step]


def _where(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    """(positions, segments) of a batch."""
    segments = batch.get("segments")
    positions = batch.get("positions")
    return decoder.restarting(batch["tokens"], segments) if positions is None else positions, segments


@functools.partial(jax.jit, static_argnums=0)
def _begin(config: ModelConfig, params: tree.Params, batch: Batch) -> jax.Array:
    return decoder.embed(config, params, batch["tokens"], *_where(batch))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _onward(config: ModelConfig, kind: Layer, params: tree.Params, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    return decoder.layer(config, kind, params, x_BTD, *_where(batch))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _grams(
    config: ModelConfig, kind: Layer, paths: tuple[str, ...], params: tree.Params, x_BTD: jax.Array, batch: Batch
) -> dict[str, jax.Array]:
    """float32[in, in] by path: the sum of x x^T over the inputs of one layer's matrices."""
    mask = Shared(calibration.counted(batch, False))

    def value(zeros: dict[str, Any]) -> jax.Array:
        watched = params
        for path in paths:
            watched = tree.wrap(watched, path, lambda w, z=zeros[path]: Tap(w, *z, mask=mask))
        return jnp.sum(decoder.layer(config, kind, watched, x_BTD, *_where(batch)).astype(jnp.float32))

    zeros = {path: tap.zeros(tree.get(params, path)) for path in paths}
    return {path: gram for path, (gram, _, _) in jax.grad(value)(zeros).items()}
