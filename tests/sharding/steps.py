"""The real training step under a mesh, as `jaxft train` puts it together: of arrays, or of shapes alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft import peft
from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.models import families, init
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.quant import QuantConfig
from jaxft.rollout import score
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.training import optim, paged, state, step
from jaxft.training.config import OptimConfig
from jaxft.training.optim import Optimizer

ROW = OBJECTIVES["sft"]
ASKED = ROW.asked(SFT())


class Base(NamedTuple):
    """The fields that `peft.adapt` reads."""

    params: tree.Params
    names: Names
    config: ModelConfig


class Parts(NamedTuple):
    """What a step is made of: trained and frozen leaves (arrays or shapes), and where they belong."""

    config: ModelConfig
    trainable: tree.Params
    frozen: tree.Params
    mask: tree.Params
    optimizer: Optimizer


def parts(
    raw: dict[str, Any],
    method: Any,
    dtype: Any,
    settings: OptimConfig,
    abstract: bool = False,
    quant: QuantConfig | None = None,
) -> Parts:
    """A random model of a config.json, adapted; `abstract`: its shapes only, nothing allocated."""
    config, names = families.read(raw)

    def make(key: jax.Array) -> tree.Params:
        spread = 0.02 if abstract else 0.2
        return peft.adapt(
            Base(init.random(config, names, key, dtype, spread, quant and quant.packer), names, config), key, method
        )

    params = (jax.eval_shape if abstract else lambda f, k: f(k))(make, jax.random.key(0))
    first = method if not isinstance(method, list) else method[0]
    mask = tree.trainable_mask(params, peft.method_of(first).select(first))
    trainable, frozen = tree.partition(params, mask)
    return Parts(config, trainable, frozen, mask, optim.make(settings, trainable, 10))


def shardings(made: Parts, mesh: Mesh, offload: bool = False) -> step.Shardings:
    """Of the step's state (`offload`: its moments on the host), frozen leaves and batch."""
    places = rules.shardings(tree.combine(made.trainable, made.frozen), mesh)
    ours, theirs = tree.partition(places, made.mask)
    shapes = state.abstract(made.trainable, made.optimizer, jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    held = state.shardings(shapes, ours, whole)
    if offload:
        held = held._replace(opt_state=paged.places(shapes.opt_state, held.opt_state))
    return step.Shardings(held, theirs, mesh_.batch_sharding(mesh))


def build(made: Parts, dtype: Any, execution: Execution, where: step.Shardings | None) -> Any:
    """The jitted step, with the metrics that `jaxft train` reports."""
    scorer = score.make_score(made.config, (*ASKED.needs, *ASKED.reports), dtype=dtype, execution=execution)
    return step.make_step(ROW, SFT(), scorer, made.optimizer, where)


def mesh(dims: tuple[int, int, int], devices: Any = None) -> Mesh:
    """A mesh of the first devices."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(devices[: int(np.prod(dims))].reshape(dims), mesh_.AXES, axis_types=(AxisType.Auto,) * 3)


def batch(accumulate: int, rows: int, length: int, vocabulary: int, reserved: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in rows of one to three documents of uneven length, padded; some tokens carry no loss.

    `reserved`: positions that a prompt takes of each document."""
    rng = np.random.default_rng(0)
    segments = np.zeros((accumulate * rows, length), np.int32)
    positions = np.zeros_like(segments)
    for row in range(len(segments)):
        cuts = np.sort(rng.choice(np.arange(2, length), size=row % 3 + 1, replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            segments[row, start:end], positions[row, start:end] = number + 1, np.arange(end - start)
    tokens = np.where(segments > 0, rng.integers(0, vocabulary, segments.shape), 0).astype(np.int32)
    learnt = (positions > reserved) & (rng.random(segments.shape) < 0.7)
    rows_of = {"tokens": tokens, "positions": positions, "segments": segments, "loss_mask": learnt}
    return {name: value.reshape(accumulate, rows, length) for name, value in rows_of.items()}


def shapes(accumulate: int, rows: int, length: int, where: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The same, without the numbers."""
    dtypes = {"tokens": jnp.int32, "positions": jnp.int32, "segments": jnp.int32, "loss_mask": jnp.bool_}
    return {n: jax.ShapeDtypeStruct((accumulate, rows, length), d, sharding=where) for n, d in dtypes.items()}
