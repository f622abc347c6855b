"""The device mesh and what crosses its border: start-up of many hosts, placing batches.

Three axes: ``data`` (rows, weights repeated), ``fsdp`` (rows, weights sharded and gathered before use), ``tensor``
(heads and feed-forward features). Axes are Auto: the compiler propagates; we constrain activations and weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; one axis may be -1, which takes all devices that are left."""

    data: int = 1
    """Replicas of the model that each see other rows."""
    fsdp: int = -1
    """Shards of the weights that each see other rows."""
    tensor: int = 1
    """Shards of each layer's heads and feed-forward features."""
    distributed: bool = False
    """Whether several hosts take part (a TPU pod slice): waits for all of them at start."""


def start(config: MeshConfig) -> None:
    """Joins the other hosts if the run is distributed; to be called before any device is touched."""
    if config.distributed and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Axis sizes with -1 resolved. Raises ValueError if they do not multiply to the number of devices."""
    wanted = [getattr(config, axis) for axis in AXES]
    open_axes = [axis for axis, size in zip(AXES, wanted, strict=True) if size == -1]
    fixed = math.prod(size for size in wanted if size != -1)
    bad = [f"mesh.{axis}={size}" for axis, size in zip(AXES, wanted, strict=True) if size < 1 and size != -1]
    if bad or len(open_axes) > 1:
        raise ValueError(
            f"mesh: got {', '.join(bad or open_axes)}; expected sizes of at least 1, at most one of them -1"
        )
    if devices % fixed or (not open_axes and fixed != devices):
        got = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, wanted, strict=True))
        raise ValueError(f"mesh: {got} does not fit {devices} devices; their product must be {devices} (-1 fills up)")
    resolved = [devices // fixed if size == -1 else size for size in wanted]
    return resolved[0], resolved[1], resolved[2]


def create(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor) over ``devices`` (default: all, nearest neighbours on the last axis)."""
    devices = jax.devices() if devices is None else devices
    shape = sizes(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batch arrays [accumulate, rows, ...]: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def check_rows(mesh: Mesh, rows: int) -> None:
    """Raises ValueError unless the rows of a micro-batch divide over the data axes."""
    shards = row_shards(mesh)
    if rows % shards:
        raise ValueError(
            f"train.batch={rows} rows do not divide over data x fsdp = {shards} devices; "
            f"use a multiple of {shards}, or more of mesh.tensor"
        )


def row_shards(mesh: Mesh | None) -> int:
    """How many devices share the rows of a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def placer(mesh: Mesh | None) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """Puts host arrays [accumulate, rows, ...] on the mesh (None: the default device).

    Every host holds the whole batch and sends its own rows."""
    if mesh is None:
        return lambda batch: {name: jax.device_put(value) for name, value in batch.items()}
    sharding = batch_sharding(mesh)
    return lambda batch: {
        name: jax.make_array_from_callback(value.shape, sharding, lambda index, v=value: v[index])
        for name, value in batch.items()
    }
