"""What a verb works on after training: a run's folder, an adapter, a model's folder or hub id, or a config.

`jaxft chat runs/mine` takes the model that the run began with and what the run made of it; `jaxft chat CONFIG.yaml` the
model as it was before.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxft import config as config_
from jaxft import model as model_
from jaxft import recipes, run_dir, scoring, vocabulary
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import tokenizer
from jaxft.cli import heads
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.model import Model
from jaxft.peft import disk
from jaxft.sharding import rules


@dataclass(frozen=True)
class Target:
    """What was asked for, before anything big is read."""

    config: RunConfig
    """`model` says what to load; the rest is the run's own, or the defaults."""
    adapter: Path | None
    """The adapter to put on the model."""
    begun: RunConfig | None = None
    """Of a run: what it began with."""


def add(parser: argparse.ArgumentParser, sections: Sequence[str] = ()) -> None:
    """Adds `TARGET [key=value ...]`; `--help` lists the keys of these sections."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a run's folder, an adapter's folder, a model's folder or hub id, or a config",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the config to set")
    parser.set_defaults(takes_config=bool(sections), sections=tuple(sections))


def find(name: str, overrides: Sequence[str] = ()) -> Target:
    """What a user means by TARGET. Raises ConfigError."""
    path = Path(name)
    if "=" in name and not path.exists():
        raise ConfigError(f"expected a run, an adapter, a model or a config before {name!r}")
    if (path / run_dir.CONFIG).is_file():
        return _run(path, overrides)
    if (path / run_dir.PIPELINE).is_file():
        every = "\n".join(f"  {stage.parent}" for stage in sorted(path.glob(f"*/{run_dir.CONFIG}")))
        raise ConfigError(f"{path}: a pipeline of several runs; say which of them:\n{every}")
    weights = any((path / file).is_file() for file in (disk.WEIGHTS, disk.PICKLE))
    if (path / disk.CONFIG).is_file() or weights:
        base = disk.read_config(path).get("base_model_name_or_path")
        if not base and not _base(overrides):
            raise ConfigError(f"{path}: the adapter does not name its base model; say model.path=<folder or hub id>")
        return Target(config_.load(None, [f"model.path={base}", *overrides]), path)
    if path.suffix in (".yaml", ".yml") or (not path.exists() and name in [recipe.name for recipe in recipes.every()]):
        return Target(config_.load(recipes.find(name), overrides), None)
    return Target(config_.load(None, [f"model.path={name}", *_same(name, overrides)]), None)


def _base(overrides: Sequence[str]) -> str | None:
    """The `model.path=` among the overrides, if there is one."""
    return next((word for word in overrides if word.startswith("model.path=")), None)


def _same(name: str, overrides: Sequence[str]) -> Sequence[str]:
    """The overrides. Raises ConfigError if they put another model in the place of the one that is asked for."""
    if given := _base(overrides):
        path = Path(name)
        held = disk.some(sorted(p.name for p in path.iterdir())) if path.is_dir() else "no such folder here"
        raise ConfigError(
            f"{name}: got {given} beside it, which would take its place ({name}: {held or 'it is empty'}); expected "
            f"the folder of an adapter or of a run that made one ({disk.CONFIG} or {run_dir.CONFIG} in it), or a model "
            "without model.path"
        )
    return overrides


def _run(folder: Path, overrides: Sequence[str]) -> Target:
    """The model that a run began with and its adapter, or the whole model that it made."""
    begun = config_.load(folder / run_dir.CONFIG, overrides)
    if (folder / run_dir.BASE / "config.json").is_file() and (folder / run_dir.ADAPTER / disk.CONFIG).is_file():
        if asked := [word for word in overrides if word.startswith("quant.")]:
            raise ConfigError(
                f"{folder}: got {' '.join(asked)}; the run's adapter belongs to the four-bit base that was made with "
                f"it ({run_dir.BASE}/), and to no other"
            )
        own = ["model.revision=null", "model.new_tokens=[]", f"model.path={folder / run_dir.BASE}", "quant.method=none"]
        return Target(config_.load(folder / run_dir.CONFIG, [*own, *overrides]), folder / run_dir.ADAPTER, begun)
    if (folder / run_dir.ADAPTER / disk.CONFIG).is_file():
        return Target(begun, folder / run_dir.ADAPTER, begun)
    if (folder / run_dir.WHOLE / "config.json").is_file():
        made = [
            "model.revision=null",
            "model.init=pretrained",
            f"model.path={folder / run_dir.WHOLE}",
            "model.new_tokens=[]",
        ]
        return Target(config_.load(folder / run_dir.CONFIG, [*made, *_same(str(folder), overrides)]), None, begun)
    refuse_sweep(folder)
    raise ConfigError(
        f"{folder}: the run has no result yet ({run_dir.ADAPTER}/ or {run_dir.WHOLE}/); let it end: "
        f"jaxft train {folder / run_dir.CONFIG} --resume"
    )


def refuse_sweep(folder: Path) -> None:
    """Raises ConfigError for the folder of a sweep, naming the runs in it."""
    if (folder / run_dir.MEMBERS).is_dir():
        every = "\n".join(f"  {member}" for member in sorted((folder / run_dir.MEMBERS).iterdir()))
        raise ConfigError(f"{folder}: a sweep of several runs; say which of them:\n{every}")


def _scoring(found: Target, model: Model, mesh: Mesh | None) -> Model:
    """The model with the head that its adapter, or the objective, is for."""
    if heads.scores(found.config):
        return heads.fitted(found.config, model, mesh)
    adapts = found.adapter is not None and disk.read_config(found.adapter).get("task_type") == "SEQ_CLS"
    return heads.placed(scoring.reward_model(model, init="zeros"), mesh) if adapts else model


def load(found: Target, mesh: Mesh | None = None) -> tuple[Model, tree.Params]:
    """The model, and its parameters with the adapter on them; on a mesh if there is one."""
    base = model(found, mesh)
    params = base.params if found.adapter is None else model_.load_adapter(base, found.adapter)
    return base, params if mesh is None else jax.device_put(params, rules.shardings(params, mesh))


def model(found: Target, mesh: Mesh | None = None) -> Model:
    """The model, with the vocabulary and the head that its adapter is for, and without the adapter."""
    section = found.config.model
    if section.init == "random":
        raise ConfigError(
            f"model.init: random weights of {section.path} are not kept; give a model that is (model.init=pretrained)"
        )
    quant = found.config.quant
    made = model_.load(section.path, section.dtype, revision=section.revision, mesh=mesh, quantize=quant)
    brought = None if found.adapter is None else tokenizer.load(found.adapter)
    if brought is not None:
        made = vocabulary.with_tokenizer(made, brought, section.vocab_multiple)
    elif section.new_tokens:
        made = vocabulary.grow(made, section.new_tokens, section.vocab_multiple)
    return _scoring(found, vocabulary.padded_with(made, section.pad_token), mesh)
