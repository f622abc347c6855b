"""What `jaxft train` hands to the training loop, for a run and for a sweep of runs alike."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from jaxft import data, run_dir
from jaxft import model as model_
from jaxft.border import check
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import state as disk
from jaxft.checkpoint.state import Record
from jaxft.cli import assemble, forgetting, heads
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.core.weight import Weight
from jaxft.data import Loader, Prepared
from jaxft.model import Model
from jaxft.objectives import OBJECTIVES, terms
from jaxft.objectives.terms import Means
from jaxft.peft import store
from jaxft.quant import FourBit
from jaxft.rollout import distil
from jaxft.sharding import mesh as mesh_
from jaxft.training import evaluate, loop, prefetch
from jaxft.training.evaluate import Evaluator
from jaxft.training.loop import Result
from jaxft.training.optim import Optimizer
from jaxft.training.state import TrainState
from jaxft.training.step import Frozen, Shardings, Step


@dataclass(frozen=True)
class Material:
    """The data of a run."""

    prepared: Prepared
    train: Loader
    held_out: Callable[[], Loader] | None
    """Starts the held-out batches anew; None: there are none."""
    steps: int


@dataclass(frozen=True)
class Job:
    """What is trained on what, and what becomes of it."""

    step: Step
    state: TrainState
    frozen: Frozen
    record: Record
    optimizer: Optimizer
    flops: float
    """Of a token, forward and backward."""
    begin: Callable[[Path], tuple[Any, Sequence[Evaluator]]]
    """Given the run's folder, which is claimed last: the training batches, and what evaluates."""
    finish: Callable[[Result, tree.Params, Path], int]
    """``(result, trained arrays, folder)``: writes what came out of it and tells about it; gives the exit code."""
    read: Callable[[int, Mapping[str, Any]], dict[str, float]] = loop.numbers
    """See `loop.fit`."""
    feed: Callable[..., prefetch.Read] = prefetch.ahead
    """See `loop.fit`."""


def record(config: RunConfig, frozen: tree.Params) -> Record:
    """What a checkpoint must tell of this run."""
    return Record(check.plain(config), disk.identity(frozen))


def material(config: RunConfig, base: Model) -> Material:
    """Reads and tokenises the data."""
    rows, reserved = OBJECTIVES[config.objective.name].rows, assemble.virtual(config).get("prompt", 0)
    prepared = data.prepare(config.data, base.tokenizer, rows, reserved)
    heads.check_ends(config, prepared)
    train, held_out = assemble.loaders(config, prepared)
    return Material(prepared, train, held_out, loop.total_steps(config.train, train.batches_per_epoch))


def handed_over(
    base: Model, frozen: tree.Params, unroll: bool, beside: Mapping[str, tree.Params] = MappingProxyType({})
) -> tuple[Model, tree.Params, Mapping[str, tree.Params]]:
    """The model without any arrays of its own, and the frozen ones as the step wants them: they exist once. ``beside``:
    parameters of others, which may share them."""
    if unroll:
        known: dict[int, Any] = {}
        frozen, beside = unrolled(frozen, known), {name: unrolled(each, known) for name, each in beside.items()}
    return dataclasses.replace(base, params=None), frozen, beside


def unrolled(params: tree.Params, known: dict[int, Any]) -> tree.Params:
    """The parameters, a value model's too, with their layers apart; the stacks are freed. Trees that share stacks go on
    sharing them, told by the same ``known``."""
    made = tree.split_layers(params, donate=True, known=known)
    inside = {name: unrolled(made[name], known) for name in (terms.CRITIC,) if name in made}
    return {**made, **inside}


def shardings(places: TrainState | None, frozen: Frozen, mesh: Mesh | None) -> Shardings | None:
    """Where the step's arguments live; None where nothing says so: on a single device."""
    if places is None:
        return None
    if mesh is None:
        return Shardings(places, None, None)
    return Shardings(places, jax.tree.map(lambda a: a.sharding, frozen), mesh_.batch_sharding(mesh))


def refuse_metric(config: RunConfig, sums: Means | None = None) -> None:
    """Raises ConfigError for an `eval.metric` that this run will not evaluate: before the first step, not after it.

    ``sums``: of the held-out set, if there is one."""
    names = set() if config.eval.general is None else set(forgetting.METRICS)
    if sums is not None:
        names |= {*evaluate.summary(dict.fromkeys(sums, 0.0)), *(["exact_match"] if config.eval.exact_match else [])}
    if config.eval.metric not in names:
        raise ConfigError(f"`eval.metric`: got {config.eval.metric!r}; this run evaluates {', '.join(sorted(names))}")


def write(config: RunConfig, base: Model, params: tree.Params, changed: set[str], dtype: str, folder: Path) -> Path:
    """The adapter, or the whole model where only arrays of its own were trained; an earlier one is replaced.

    An adapter that has its own four-bit base has that written beside it, as bitsandbytes stores it. What trained beside
    the model is left out: a value model, projections of a distillation."""
    params = terms.actor(distil.without(params))
    if tree.adapters(params):
        out, source = folder / run_dir.ADAPTER, base.source if config.model.init == "pretrained" else None
        if anew := _packed_anew(params, changed):
            whole = folder / run_dir.BASE
            how = {"dtype": dtype, "overwrite": whole.exists(), "packed": True}
            source = str(model_.save_hf(base, tree.strip(params), whole, **how))
            changed = {path for path in changed if path.rpartition("/")[0] not in anew}
        store.save(
            params,
            base.names,
            base.config.num_layers,
            out,
            methods=[choice.value for choice in config.peft],
            changed=changed,
            new_tokens=base.new_tokens,
            base_model_name_or_path=source,
            overwrite=out.exists(),
        )
        base.tokenizer.save_pretrained(out)
        return out
    out = folder / run_dir.WHOLE
    model_.save_hf(base, params, out, dtype=dtype, overwrite=out.exists())
    return out


def _packed_anew(params: tree.Params, changed: set[str]) -> set[str]:
    """Paths of the four-bit weights that are no longer the model's own."""
    found = set()
    for path, w in tree.paths(params, inside=False):
        while isinstance(w, Weight):
            found |= {path} if isinstance(w, FourBit) and f"{path}/codes" in changed else set()
            path, w = f"{path}/base", getattr(w, "base", None)
    return found
