"""The state of a training run on disk: orbax checkpoints of arrays, with a JSON record of all else beside them.

A checkpoint is the state, the cursor behind the last batch that went into it, the config, and the identity of the
frozen base. Orbax writes each into a folder of its own and commits it last, so a write that was cut short, by SIGKILL
too, is never seen: the newest complete checkpoint is used.

Unusual: arrays are saved as a flat dict from path to array, so `None` holes and Weight classes need no serialisation,
and a restore that does not fit can name each array. PRNG keys are saved as their data. The base is identified by a
checksum of its bits, the same whatever its sharding.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxft.checkpoint import cursor as cursor_
from jaxft.checkpoint.config import CheckpointConfig
from jaxft.checkpoint.errors import CheckpointError, some
from jaxft.core import tree

S = TypeVar("S")

DEFAULT = CheckpointConfig()
# config keys that may differ when a run goes on
MAY_CHANGE = (
    "run_dir",
    "resume",
    "train.steps",
    "train.epochs",
    "optim.offload",
    "data.cache",
    "data.workers",
    "mesh",
    "eval",
    "generate",
    "checkpoint",
    "log",
)


@dataclass(frozen=True)
class Record:
    """What is saved beside the arrays; everything in it is JSON, but for arrays (numpy) in the cursor."""

    config: dict[str, Any]
    """The resolved config of the run."""
    base: dict[str, Any]
    """The frozen base (see `identity`)."""
    cursor: Any = None
    """Where the data goes on: behind the last batch consumed."""
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Counters of the loop."""


def open_folder(
    folder: Path | str, config: CheckpointConfig = DEFAULT, mode: Literal["min", "max"] = "min"
) -> ocp.CheckpointManager:
    """The run's checkpoints, in ``folder`` (made if missing). Close it to wait for the last write.

    ``mode``: whether the best score is the lowest or the highest."""
    policies = ocp.checkpoint_managers
    keep: list[ocp.checkpoint_managers.PreservationPolicy] = [policies.LatestN(max(config.keep_last, 1))]
    if config.keep_best:
        sign = -1 if mode == "min" else 1
        keep.append(
            policies.BestN(
                get_metric_fn=lambda metrics: sign * metrics["score"],
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        enable_async_checkpointing=config.asynchronous,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, record: Record, score: float | None = None) -> None:
    """Writes a checkpoint unless that step has one; in the background if the manager is asynchronous.

    The arrays are copied before this returns, so the state may be donated at once. ``score`` ranks the checkpoint for
    keep-best; None leaves it out of the ranking."""
    if step in manager.all_steps():
        return
    arrays = _flat(state)
    cursor, beside = cursor_.parted(record.cursor)
    record = dataclasses.replace(record, cursor=cursor)
    note = {"format": 1, "arrays": {p: _shape(a) for p, a in arrays.items()}, **dataclasses.asdict(record)}
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave({p: _apart(_data(a)) for p, a in arrays.items()}),
            record=ocp.args.JsonSave(note),
            **({"cursor": ocp.args.StandardSave(beside)} if beside else {}),
        ),
        metrics=None if score is None else {"score": float(score)},
    )


def read(manager: ocp.CheckpointManager, step: int | None = None) -> Record:
    """The record of a checkpoint (default: the newest), without any arrays."""
    note = _note(manager, _step(manager, step))
    return Record(**{f.name: note[f.name] for f in dataclasses.fields(Record)})


def restore(
    manager: ocp.CheckpointManager,
    like: S,
    expected: Record,
    step: int | None = None,
    may_change: tuple[str, ...] = MAY_CHANGE,
) -> tuple[S, Record]:
    """The state and record of a checkpoint (default: the newest complete one).

    Args:
      like: a state of the same structure: its arrays (or shapes with shardings) give shapes, dtypes and places.
      expected: the config and base of this run. Raises CheckpointError naming what differs.
      may_change: config keys, or sections, that may differ.
    """
    step = _step(manager, step)
    note = _note(manager, step)
    record = Record(**{f.name: note[f.name] for f in dataclasses.fields(Record)})
    where = f"{manager.directory}/{step}"
    _refuse_changes(where, record, expected, may_change)
    _refuse_arrays(where, note["arrays"], {p: _shape(a) for p, a in _flat(like).items()})
    places = {p: a.sharding for p, a in _flat(like).items()}
    targets = jax.eval_shape(lambda arrays: {p: _data(a) for p, a in arrays.items()}, _flat(like))
    targets = {p: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=places[p]) for p, t in targets.items()}
    found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(targets)))["state"]
    leaves = [
        jax.random.wrap_key_data(found[p], impl=jax.random.key_impl(a)) if _is_key(a) else found[p]
        for p, a in _flat(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), _with_arrays(manager, step, record)


def _with_arrays(manager: ocp.CheckpointManager, step: int, record: Record) -> Record:
    """The record with the arrays of its cursor, if it has any."""
    if not (Path(manager.directory) / str(step) / "cursor").exists():
        return record
    beside = manager.restore(step, args=ocp.args.Composite(cursor=ocp.args.StandardRestore()))["cursor"]
    return dataclasses.replace(record, cursor=cursor_.joined(record.cursor, beside))


def identity(params: tree.Params) -> dict[str, Any]:
    """What tells one base from another: parameters, and a checksum of every path, shape, dtype and bit.

    The same for any sharding. One pass over the arrays, on the device; ``None`` holes count nothing."""
    named = tree.arrays(params)
    sums = jax.jit(lambda leaves: [_checksum(leaf) for leaf in leaves])([leaf for _, leaf in named])
    digest = hashlib.sha256()
    for (path, leaf), total in zip(named, jax.device_get(sums), strict=True):
        digest.update(f"{path} {_shape(leaf)} {int(total)}\n".encode())
    return {"parameters": tree.count(params), "checksum": digest.hexdigest()[:16]}


def _checksum(leaf: jax.Array) -> jax.Array:
    """Sum of the bits of each element times its place, modulo 2^32: integers, so the order of adding is free."""
    size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(leaf.dtype.itemsize)
    floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
    bits = jax.lax.bitcast_convert_type(leaf, size) if floating and size is not None else leaf
    place = jnp.ones(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = 2 * math.prod(leaf.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits.astype(jnp.uint32) * place, dtype=jnp.uint32)


def _flat(state: Any) -> dict[str, jax.Array]:
    return dict(tree.arrays(state))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _apart(leaf: jax.Array) -> jax.Array:
    """A copy of what is in the host's memory already: it would be written as it is then, perhaps after a donation."""
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if leaf.sharding.memory_kind == "pinned_host" else leaf


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype.name if hasattr(leaf.dtype, 'name') else leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _step(manager: ocp.CheckpointManager, step: int | None) -> int:
    steps = manager.all_steps()
    if step is None and steps:
        return max(steps)
    if step is None or step not in steps:
        got = f"complete checkpoints at steps {sorted(steps)}" if steps else "no complete checkpoint"
        raise CheckpointError(manager.directory, got, "one to resume" if step is None else f"step {step}", "")
    return step


def _note(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]


def _refuse_changes(where: str, saved: Record, now: Record, may_change: tuple[str, ...]) -> None:
    """Raises CheckpointError if the base is another one, or the config differs where it matters."""
    base = differences(saved.base, _json(now.base), ())
    if base:
        remedy = "Resume with the model the run began with, or start a new run_dir."
        raise CheckpointError(where, "a run on another base: " + "; ".join(base), "the same base", remedy)
    config = differences(saved.config, _json(now.config), may_change)
    if config:
        remedy = "Set them back, or choose another run_dir to start afresh."
        raise CheckpointError(where, "another config: " + "; ".join(config), "the config of the run", remedy)


def differences(old: Any, new: Any, may_change: tuple[str, ...] = MAY_CHANGE) -> list[str]:
    """What differs between two resolved configs (plain values), key by key, but for what may."""
    before, after = _leaves(old), _leaves(new)
    keys = [k for k in {**before, **after} if not any(f"{k}.".startswith(f"{free}.") for free in may_change)]
    return [
        f"{k} was {before.get(k, 'not there')!r} and is {after.get(k, 'not there')!r}"
        for k in keys
        if k not in before or k not in after or before[k] != after[k]
    ]


def _leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        key: leaf
        for name, value in values.items()
        for key, leaf in _leaves(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _json(value: Any) -> Any:
    """As it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(value))


def _refuse_arrays(where: str, saved: dict[str, str], now: dict[str, str]) -> None:
    missing, extra = sorted(now.keys() - saved.keys()), sorted(saved.keys() - now.keys())
    other = [f"{p} {saved[p]} (now {now[p]})" for p in now if p in saved and saved[p] != now[p]]
    parts = [("without ", missing), ("with unknown ", extra), ("with ", other)]
    wrong = "; ".join(what + some(names) for what, names in parts if names)
    if wrong:
        remedy = "Resume with the fine-tuning method and optimiser the run began with, or start a new run_dir."
        raise CheckpointError(where, f"a state {wrong}", "the arrays of this run", remedy)
