r"""A dense model made ready for decoding on a GPU, where a step is little more than reading every weight once.

Matrices that read the same input lie side by side (query, key and value; gate and up), adapters are worked into them,
each layer has arrays of its own, and products of few rows run in a kernel that divides the inner dimension as well, so
that all multiprocessors read. Nothing but rounding changes.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.stacks import Split
from jaxft.core.weight import Affine, Slot, Weight, parameter, weight
from jaxft.models import attention_paged
from jaxft.models.config import ModelConfig

ROWS = 64
"""Rows up to which the kernel multiplies; more of them XLA multiplies as fast."""

PROGRAMS = 96
"""Programs of a product, at least, where it can be divided into as many."""


@weight
class Few(Weight):
    """A dense matrix [in, out] that mostly few rows are multiplied with."""

    base: Any = parameter()
    adapter: ClassVar[bool] = False

    def __rmatmul__(self, x):
        rows = math.prod(x.shape[:-1])
        if rows > ROWS or x.dtype != self.base.dtype or (tiles := tiling(*self.base.shape)) is None:
            return x @ self.base
        return product(x.reshape(rows, -1), self.base, *tiles).reshape(*x.shape[:-1], -1)

    def dense(self):
        return self.base


def tiling(inner: int, outer: int) -> tuple[int, int, int] | None:
    """Columns of a tile, its depth, and the parts of the inner dimension, as they were fastest on an H200; None where
    they do not divide."""
    columns, depth, parts = (128, 64, 1) if outer >= 128 * PROGRAMS else (64, 128, 1)
    if outer % columns:
        return None
    while outer // columns * parts < PROGRAMS:
        parts *= 2
    return (columns, depth, parts) if inner % (depth * parts) == 0 else None


def product(x: jax.Array, w: jax.Array, columns: int, depth: int, parts: int, *, interpret: bool = False) -> jax.Array:
    """``x @ w`` for few rows, summed in float32; the sums of the parts are added outside."""
    from jax.experimental import pallas as pl  # imported where there is a GPU
    from jax.experimental.pallas import triton as plgpu

    rows, (inner, outer) = x.shape[0], w.shape
    x = jnp.pad(x, ((0, max(16, pl.next_power_of_2(rows)) - rows), (0, 0)))
    sums = pl.pallas_call(
        functools.partial(_tile, pl, columns, depth, inner // parts),
        grid=(outer // columns, parts),
        out_shape=jax.ShapeDtypeStruct((parts, x.shape[0], outer), x.dtype if parts == 1 else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="product_few_rows",
    )(x, w)
    return (sums[0] if parts == 1 else jnp.sum(sums, axis=0).astype(x.dtype))[:rows]


def _tile(pl, columns: int, depth: int, length: int, x, w, out) -> None:
    """One tile of columns, one part of the inner dimension."""
    over, begin = pl.ds(pl.program_id(0) * columns, columns), pl.program_id(1) * length

    def turn(i, total):
        at = pl.ds(begin + i * depth, depth)
        return total + jnp.dot(x[:, at], w[at, over], preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, length // depth, turn, jnp.zeros((x.shape[0], columns), jnp.float32))
    out[pl.program_id(1), :, over] = total.astype(out.dtype)


def merges(params: tree.Params) -> bool:
    """Whether all adapters can be worked into dense matrices, and there are any."""
    leaves = [w for _, w in tree.paths(params, inside=False) if isinstance(w, Weight)]
    chain = [w for leaf in leaves for w in _chain(leaf)]
    whole = all(w.mergeable and not w.packed and not w.several for w in chain) and not any(
        isinstance(part, Slot) for part in params.values()
    )
    return whole and any(w.adapter for w in chain)


def _chain(w: Any) -> list[Weight]:
    found = []
    while isinstance(w, Weight):
        found.append(w)
        w = getattr(w, "base", None)
    return found


def merged(params: tree.Params) -> tree.Params:
    """The model with its adapters worked in, a layer at a time: each has arrays of its own."""
    rest = {name: part for name, part in params.items() if name != "layers"}
    return {**_merge(rest), "layers": _apart(params["layers"], _merge)}


@jax.jit
def _merge(params: tree.Params) -> tree.Params:
    return tree.cast(tree.merge(params), jax.tree.leaves(params)[0].dtype) if params else params


def able(params: tree.Params) -> bool:
    """Whether this model decodes on one GPU, and has dense layers of 16 bits without adapters."""
    layers = jax.tree.leaves(params["layers"], is_leaf=lambda w: isinstance(w, Weight))
    plain = all(not isinstance(w, Weight) or (isinstance(w, Affine) and not isinstance(w.base, Weight)) for w in layers)
    return plain and params["embed"]["tokens"].dtype.itemsize == 2 and attention_paged.on_one_gpu()


def prepared(config: ModelConfig, params: tree.Params) -> tuple[ModelConfig, tree.Params]:
    """The same model as it decodes fastest."""
    split = config.qkv == "separate"
    gated = config.gated_mlp and not config.fused_gate_up
    layers = _apart(params["layers"], functools.partial(_side_by_side, split, gated))
    config = dataclasses.replace(
        config, qkv="blocks" if split else config.qkv, fused_gate_up=config.fused_gate_up or gated
    )
    return config, {**params, "layers": layers}


def _apart(layers: tree.Params, fn: Any) -> tree.Params:
    """``fn`` of each layer, held one by one."""
    count = tree.num_layers({"layers": layers})
    made = [fn(tree.layer(layers, i)) for i in range(count)]
    return jax.tree.map(lambda *parts: Split(parts), *made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _side_by_side(split: bool, gated: bool, layer: tree.Params) -> tree.Params:
    attn, mlp = dict(layer["attn"]), dict(layer["mlp"])
    if split:
        attn["qkv"] = _beside(*(attn.pop(name) for name in "qkv"))
    if gated:
        mlp["gate_up"] = _beside(mlp.pop("gate"), mlp.pop("up"))
    return jax.tree.map(lambda w: Few(w) if w.ndim == 2 else w, {**layer, "attn": attn, "mlp": mlp})


def _beside(*ws: Any) -> Any:
    """Matrices of one input as one; a bias of zeros where only others have one."""
    matrices = [w.base if isinstance(w, Affine) else w for w in ws]
    whole = jnp.concatenate(matrices, axis=-1)
    if not any(isinstance(w, Affine) for w in ws):
        return whole
    biases = [w.bias if isinstance(w, Affine) else jnp.zeros(w.shape[-1], w.dtype) for w in ws]
    return Affine(whole, jnp.concatenate(biases, axis=-1))
