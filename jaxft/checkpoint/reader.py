"""Tensors on disk to arrays on devices, one leaf at a time, in their final dtype and sharding.

On a CPU the stacked leaf itself is the host buffer: tensors are read, cast and transposed straight into it, and JAX
takes it over without a copy. On an accelerator each layer's raw bytes (of this host's slices alone) go through one host
buffer; the cast and the transpose happen on the device, in a donated update of the stack. Either way the host never
holds more beyond the model than about one tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.checkpoint.errors import CheckpointError
from jaxft.checkpoint.layout import Entry
from jaxft.checkpoint.tensorfile import DTYPES, Reader, Target, Tensor
from jaxft.core.weight import Weight

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
Bounds = tuple[tuple[int, int], ...]  # (start, stop) of a device's slice along each axis of a leaf
Groups = dict[Bounds, list[Any]]  # the devices that hold each slice; [None]: the default device
ALIGNMENT = 64  # bytes; from here on JAX's CPU backend takes a buffer over instead of copying it


def read(
    reader: Reader, entry: Entry, tensors: list[Tensor], dtype: Any, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """One leaf from its tensors (one for each layer); without a sharding, on the default device and uncommitted."""
    groups: Groups = {}
    if sharding is None:
        groups[tuple((0, n) for n in entry.shape)] = [None]
        platform = jax.local_devices()[0].platform
    else:
        for device, index in sharding.addressable_devices_indices_map(entry.shape).items():
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), entry.shape, strict=True))
            groups.setdefault(bounds, []).append(device)
        platform = next(iter(sharding.addressable_devices)).platform
    arrays = (_on_host if platform == "cpu" else _on_device)(reader, entry, tensors, dtype, groups)
    if sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, arrays)


def read_packed(
    reader: Reader,
    entry: Entry,
    tensors: list[Tensor],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
    pack: Callable[[jax.Array], Weight],
    places: Callable[[Weight], Any] | None,
) -> Weight:
    """One leaf in few bits, each layer packed as it comes: beside them no more than one layer's matrix is in memory.

    ``sharding``: of that matrix; ``places``: of the arrays of the packed stack, given their shapes."""
    one = dataclasses.replace(entry, shape=entry.shape[1:], stacked=False) if entry.stacked else entry
    if isinstance(sharding, NamedSharding) and entry.stacked:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    def layer(tensor: Tensor) -> Weight:
        try:
            return pack(read(reader, one, [tensor], dtype, sharding))
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            remedy = "Leave this weight out with quant.skip, or correct the setting."
            raise CheckpointError(tensor.where, str(error), "a weight that can be quantised", remedy) from None

    return stack(map(layer, tensors), len(tensors) if entry.stacked else None, places)


def stack(layers: Iterable[Weight], count: int | None, places: Callable[[Weight], Any] | None) -> Weight:
    """Packed layers as one stack of ``count``, filled in place as they come (None: the only one, as it is)."""
    whole: Any = None
    for i, layer in enumerate(layers):
        if count is None:
            return layer if places is None else jax.device_put(layer, places(layer))
        whole = _empty(layer, count, places) if whole is None else whole
        whole = jax.block_until_ready(_put(whole, layer, i))
    return whole


def _empty(layer: Weight, count: int, places: Callable[[Weight], Any] | None) -> Any:
    """A stack of ``count`` layers like this one, to be filled."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), layer)

    def zeros() -> Any:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    return jax.jit(zeros, out_shardings=None if places is None else places(shapes))()


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Any, layer: Any, index: jax.Array) -> Any:
    """Writes one layer into its place in each array of a stack."""
    return jax.tree.map(lambda s, a: jax.lax.dynamic_update_index_in_dim(s, a, index, 0), stack, layer)


def _region(entry: Entry, bounds: Bounds) -> tuple[slice, slice]:
    """Rows and columns on disk of a slice of the leaf; a vector is one row."""
    axes = bounds[1:] if entry.stacked else bounds
    if len(axes) == 1:
        return slice(0, 1), slice(*axes[0])
    rows, columns = axes[::-1] if entry.transposed else axes
    return slice(*rows), slice(*columns)


def _layers(entry: Entry, bounds: Bounds) -> range:
    return range(*bounds[0]) if entry.stacked else range(1)


def _on_host(reader: Reader, entry: Entry, tensors: list[Tensor], dtype: Any, groups: Groups) -> list[jax.Array]:
    """Every device's slice assembled in host memory, which becomes the array."""
    buffers = {bounds: _aligned(tuple(b - a for a, b in bounds), dtype) for bounds in groups}

    def target(bounds: Bounds, layer: int) -> Target:
        array = buffers[bounds][layer - bounds[0][0]] if entry.stacked else buffers[bounds]
        array = array[None] if array.ndim == 1 else array
        return Target(*_region(entry, bounds), array.T if entry.transposed else array)

    for layer, tensor in enumerate(tensors):
        targets = [target(bounds, layer) for bounds in groups if layer in _layers(entry, bounds)]
        if targets:
            reader.read(tensor, targets)
    # Replicas share the buffer: JAX does not write into memory it was lent, not even when the array is donated.
    return [
        jax.device_put(buffers[bounds], device, may_alias=True)
        for bounds, devices in groups.items()
        for device in devices
    ]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised host array that JAX can take over."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _on_device(reader: Reader, entry: Entry, tensors: list[Tensor], dtype: Any, groups: Groups) -> list[jax.Array]:
    """Every device's slice filled layer by layer on the device, one tensor's bytes in host memory at a time."""
    arrays: dict[Bounds, list[jax.Array]] = {}
    for layer, tensor in enumerate(tensors):
        here = {}
        for bounds in groups:
            if layer in _layers(entry, bounds):
                rows, columns = _region(entry, bounds)
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                here[bounds] = Target(rows, columns, np.empty(shape, DTYPES[tensor.dtype]))
        if not here:
            continue
        reader.read(tensor, list(here.values()), narrow=dtype == np.float16)
        for bounds, target in here.items():
            shape = tuple(b - a for a, b in bounds)
            if bounds not in arrays:
                arrays[bounds] = [jnp.zeros(shape, dtype, device=device) for device in groups[bounds]]
            at = layer - bounds[0][0] if entry.stacked else 0
            for i, device in enumerate(groups[bounds]):
                x = jax.device_put(target.array, device)
                arrays[bounds][i] = _place(arrays[bounds][i], x, at, entry.transposed, entry.stacked)
        jax.block_until_ready(arrays)  # so that the next layer's buffers do not come on top of these
    return [array for bounds in groups for array in arrays[bounds]]


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _place(out: jax.Array, x: jax.Array, layer: jax.Array, transposed: bool, stacked: bool) -> jax.Array:
    """Writes one tensor, as it lies on disk, into its layer of a leaf."""
    x = (x.T if transposed else x).astype(out.dtype)
    if not stacked:
        return x.reshape(out.shape)
    return jax.lax.dynamic_update_index_in_dim(out, x.reshape(out.shape[1:]), layer, 0)
