"""Models that a run reads beside the one it trains: another reference, a teacher; and what they said, found beforehand.

Each is scored without a gradient, in the step or once before the first one.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxft import data, peft
from jaxft import model as model_
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import hf, hub, tokenizer
from jaxft.checkpoint import state as disk
from jaxft.cli import assemble
from jaxft.cli.job import Material
from jaxft.config import ReferenceSection, RunConfig, TeacherSection
from jaxft.core import tree
from jaxft.data import Examples, Loader, known, topk
from jaxft.data.retold import Retold
from jaxft.model import Model
from jaxft.models import families
from jaxft.models.decoder import Execution
from jaxft.models.divergences import Divergence
from jaxft.objectives import OBJECTIVES, Distil
from jaxft.objectives.terms import Batch
from jaxft.rollout import distil
from jaxft.rollout import score as score_
from jaxft.rollout import topk as topk_
from jaxft.rollout.score import Score
from jaxft.sharding import mesh as mesh_
from jaxft.training import prefetch

REFERENCE, TEACHER = "reference", "teacher"
"""Folders in a run's, by default, of what was found beforehand."""


def check(config: RunConfig) -> None:
    """Raises ConfigError where the sections `reference` and `teacher` do not fit the objective, before anything is
    read."""
    name, objective = config.objective.name, OBJECTIVES[config.objective.name]
    asked, follow = objective.asked(config.objective.value), objective.follow(config.objective.value)
    section = config.reference
    given = [f"reference.{f}" for f, v in vars(section).items() if v != getattr(ReferenceSection(), f)]
    if given and "reference" not in asked.views and "ref_logp" not in asked.rollout_needs:
        raise ConfigError(f"`{given[0]}`: objective {name} compares with no reference as it is set; leave it out")
    if given and follow is not None:
        raise ConfigError(f"`{given[0]}`: objective.ref_sync_steps moves the reference, which then cannot be another's")
    if section.precompute and asked.asides:
        raise ConfigError(
            f"`reference.precompute`: {name} also compares completions that change with every batch, whose "
            "log-probabilities cannot be found beforehand; leave it out (loss=apo_zero_unpaired does without them)"
        )
    if section.stored is not None and not section.precompute:
        raise ConfigError("`reference.stored`: nothing is stored without reference.precompute=true")
    given = [f"teacher.{f}" for f, v in vars(config.teacher).items() if v != getattr(TeacherSection(), f)]
    settings = config.objective.value
    if not isinstance(settings, Distil):
        if given:
            raise ConfigError(f"`{given[0]}`: objective {name} learns from no teacher; set objective.name=distil")
    elif settings.teacher == "ema":
        if given:
            raise ConfigError(f"`{given[0]}`: with objective.teacher=ema the student's running mean is the teacher")
        methods = [choice.value for choice in config.peft]
        noisy = config.train.neftune_alpha or any(getattr(method, "dropout", 0) for method in methods)
        if not settings.ce_weight and not noisy:
            raise ConfigError(
                "`objective.ce_weight`: got 0 with teacher=ema: the student begins as its own teacher, and nothing "
                "would part them; expected more, or noise (a method's dropout, train.neftune_alpha)"
            )
    elif settings.teacher == "live":
        if config.teacher.path is None:
            raise ConfigError("`teacher.path` must be given: the folder or hub id of the model to learn from")
        if unused := [key for key in given if key in ("teacher.stored", "teacher.top_k")]:
            raise ConfigError(f"`{unused[0]}`: a live teacher is not stored; set objective.teacher=stored")
    elif config.teacher.path is None and config.teacher.stored is None:
        raise ConfigError("`teacher.path` or `teacher.stored` must be given: a teacher, or what one said")
    elif config.teacher.top_k < 1:
        raise ConfigError(f"`teacher.top_k`: got {config.teacher.top_k}; expected at least 1 token of each place")
    if config.sweep and (isinstance(settings, Distil) or config.reference != ReferenceSection()):
        raise ConfigError("`sweep`: members cannot share another model yet; train them one by one")


def load(config: RunConfig, base: Model, mesh: Mesh | None) -> dict[str, Model]:
    """The other models of the step, by view."""
    found, dtype = {}, base.params["embed"]["tokens"].dtype
    if config.reference.path is not None and not config.reference.precompute:
        found["reference"] = reference(config, base, mesh, dtype)
    if isinstance(config.objective.value, Distil) and config.objective.value.teacher == "live":
        found["teacher"] = teacher(config, mesh, dtype)
    return found


def reference(config: RunConfig, base: Model, mesh: Mesh | None, dtype: Any) -> Model:
    """Another model as the reference. Raises ValueError if its tokens are not the model's."""
    section = config.reference
    made = _load(section, mesh, dtype)
    distil.shared_vocabulary(base.config, base.tokenizer, made.config, made.tokenizer, "reference")
    return made


def teacher(config: RunConfig, mesh: Mesh | None, dtype: Any) -> Model:
    """The teacher, with its adapter."""
    section = config.teacher
    made = _load(section, mesh, dtype)
    if section.adapter is not None:
        made = dataclasses.replace(made, params=model_.load_adapter(made, section.adapter))
    if made.tokenizer is None:
        raise ConfigError(
            f"`teacher.path`: {section.path} holds no tokenizer; put the model's tokenizer files beside it"
        )
    return made


def _load(section: ReferenceSection | TeacherSection, mesh: Mesh | None, dtype: Any) -> Model:
    packed = None if section.quantize == "none" else section.quantize
    return model_.load(str(section.path), str(dtype), revision=section.revision, mesh=mesh, quantize=packed)


def _stored_vocabulary(config: RunConfig, base: Model) -> int:
    """The ids from 0 that a stored teacher chose among. Raises ConfigError for ids that the model lacks."""
    section = config.teacher
    if section.path is None:
        file = Path(str(section.stored)) / "train" / topk.ABOUT
        known = topk.vocabulary(file)
        if known > base.config.vocab_size:
            raise ConfigError(f"`teacher.stored`: {file} is of {known} ids; the model has {base.config.vocab_size}")
        return known
    directory = hub.directory(section.path, section.revision, weights=False)
    other, _ = families.read(hf.config_of(directory), str(directory / "config.json"))
    return distil.shared_vocabulary(base.config, base.tokenizer, other, tokenizer.load(directory))


def handed_over(others: dict[str, Model], unroll: bool) -> dict[str, tree.Params]:
    """Their parameters as the step wants them."""
    return {
        view: tree.split_layers(model.params, donate=True) if unroll else model.params for view, model in others.items()
    }


def projected(config: RunConfig, base: Model, others: dict[str, Model]) -> dict[str, assemble.Adapted]:
    """What trains beside the model: projections of its hidden states to the teacher's, if they are compared."""
    settings = config.objective.value
    if not isinstance(settings, Distil) or not settings.hidden_layers:
        return {}
    key = jax.random.fold_in(jax.random.key(config.train.seed), 3)
    taught = others.get("teacher", base)  # or the student itself
    made = distil.project({}, base.config, taught.config, settings.hidden_layers, key)
    made, first = made[distil.PROJECTIONS], peft.first_rate([choice.value for choice in config.peft])
    return {distil.PROJECTIONS: (made, jax.tree.map(lambda _: True, made), jax.tree.map(lambda _: first, made))}


def scorer(config: RunConfig, base: Model, how: Execution, others: dict[str, Model]) -> Score:
    """`assemble.scorer` of a run whose step also scores ``others``."""
    settings = config.objective.value
    if isinstance(settings, Distil):
        return _distilled(config, base, how, others.get("teacher"))
    score = assemble.scorer(config, base, how)
    if "reference" not in others:
        return score
    asked = OBJECTIVES[config.objective.name].asked(settings)
    dtype, reserved = base.params["embed"]["tokens"].dtype, assemble.virtual(config).get("prompt", 0)
    named = {"dtype": dtype, "execution": how, "temperature": assemble.temperature(config)}
    other = score_.make_score(others["reference"].config, asked.needs, **named)

    def either(view: str, params: tree.Params, batch: Batch, key: Any = None) -> dict[str, jax.Array]:
        if view == "reference":
            return other(view, params, distil.unreserved(batch, reserved))
        return score(view, params, batch, key)

    return either


def _distilled(config: RunConfig, base: Model, how: Execution, taught: Model | None) -> Score:
    settings = config.objective.value
    asked = OBJECTIVES[config.objective.name].asked(settings)
    vocabulary = None
    if taught is not None and settings.divergence != "uld":
        vocabulary = distil.shared_vocabulary(base.config, base.tokenizer, taught.config, taught.tokenizer)
    elif stores(config):
        vocabulary = _stored_vocabulary(config, base)
    own = base.config if settings.teacher == "ema" else None
    return distil.make_score(
        base.config,
        own if taught is None else taught.config,
        asked.needs,
        dtype=base.params["embed"]["tokens"].dtype,
        divergence=Divergence(settings.divergence, settings.beta, settings.skew, settings.temperature, settings.rest),
        reports=asked.reports,
        vocabulary=vocabulary,
        layers=settings.hidden_layers,
        hidden_loss=settings.hidden_loss,
        reserved=assemble.virtual(config).get("prompt", 0),
        execution=how,
        neftune_alpha=config.train.neftune_alpha,
    )


def live(config: RunConfig) -> RunConfig:
    """The config with the other models beside the one that is evaluated, nothing stored, and no projections, which a
    run does not keep. Raises ConfigError where what a teacher said is known and the teacher is not."""
    settings, section = config.objective.value, config.reference
    if isinstance(settings, Distil):
        if config.teacher.path is None:
            raise ConfigError("`teacher.path` must be given: the model that the student is compared with")
        settings = dataclasses.replace(settings, teacher="live", ema=Distil.ema, hidden_layers=())
        return dataclasses.replace(config, objective=dataclasses.replace(config.objective, value=settings))
    return dataclasses.replace(config, reference=dataclasses.replace(section, precompute=False, stored=None))


def stores(config: RunConfig) -> bool:
    """Whether a student learns from what a teacher said beforehand."""
    settings = config.objective.value
    return isinstance(settings, Distil) and settings.teacher == "stored"


def retells(config: RunConfig) -> bool:
    """Whether the data are told again in the tokens of a teacher with another tokenizer."""
    settings = config.objective.value
    return isinstance(settings, Distil) and settings.divergence == "uld"


def stand_in(config: RunConfig, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch with zeros for what is found beforehand: to know shapes before it is."""
    shape = batch["tokens"].shape
    if config.reference.precompute:
        return batch | {"ref_logp": np.zeros(shape, np.float32)}
    if stores(config):
        several = (*shape, config.teacher.top_k)
        return batch | {"teacher_ids": np.zeros(several, np.int32), "teacher_logp": np.zeros(several, np.float16)}
    if retells(config):
        names = ("tokens", "positions", "segments", "loss_mask")
        return batch | {f"teacher_{name}": np.zeros_like(batch[name]) for name in names if name in batch}
    return batch


@dataclass(frozen=True)
class Beforehand:
    """Finds what other models say of the data, before the first step, where it is not stored yet."""

    config: RunConfig
    base: Model
    """The model that trains; its parameters are not read."""
    dtype: Any
    """Of the computation."""
    how: Execution
    console: Console

    def material(self, material: Material, params: tree.Params, folder: Path, others: dict[str, Model]) -> Material:
        """The data with what other models said of them. ``params``: as the run begins; ``folder``: the run's."""
        beside = self._finder(params, folder, others)
        if beside is None:
            return material
        parts = {"train": material.prepared.train, "held_out": material.prepared.held_out}
        found = {name: beside(part, name) for name, part in parts.items() if part is not None}
        train, held_out = assemble.loaders(self.config, material.prepared, found)
        return dataclasses.replace(material, train=train, held_out=held_out)

    def _finder(
        self, params: tree.Params, folder: Path, others: dict[str, Model]
    ) -> Callable[[Examples, str], Any] | None:
        """What finds it, given a part of the data and the part's name; None where nothing is asked for."""
        if self.config.reference.precompute:
            if self.config.reference.path is None:
                return functools.partial(self._known, self.base, params, folder)
            other = reference(self.config, self.base, self.how.mesh, self.dtype)
            return functools.partial(self._known, other, other.params, folder)
        if stores(self.config):
            return functools.partial(self._stored, folder)
        if retells(self.config):
            again = data.prepare(self.config.data, others["teacher"].tokenizer)
            parts = {"train": again.train, "held_out": again.held_out}
            return lambda examples, part: Retold(parts[part])
        return None

    @functools.cached_property
    def _reserved(self) -> int:
        return assemble.virtual(self.config).get("prompt", 0)

    def _known(self, model: Model, params: tree.Params, folder: Path, examples: Examples, part: str) -> known.Known:
        """A reference's log-probabilities."""
        config, foreign = self.config, model is not self.base
        place = folder / REFERENCE if config.reference.stored is None else Path(config.reference.stored)
        of = known.about(examples, disk.identity(params)["checksum"], config.data.max_length, self._reserved)
        if (found := known.read(place, part, of)) is not None:
            return found
        score = score_.make_score(model.config, dtype=self.dtype, execution=self.how)

        @jax.jit
        def logp(params: tree.Params, batch: Batch) -> jax.Array:
            batch = {name: value[0] for name, value in batch.items()}
            return score("reference", params, distil.unreserved(batch, self._reserved) if foreign else batch)["logp"]

        fixed, put = dataclasses.replace(config.data, shuffle=False), mesh_.placer(self.how.mesh)
        how = {"batch_rows": config.train.batch, "epochs": 1, "reserved": self._reserved, "mismatched": False}
        how["share"] = assemble.shares(config)
        loader, out = Loader(examples.once(), fixed, **how), np.zeros(len(examples.tokens), np.float32)
        self.console.print(f"reference: log-probabilities of {len(examples):,} sequences ({part}), kept in {place}")
        for number, batch in enumerate(loader):
            said = np.asarray(logp(params, put(prefetch.split(batch, 1))))
            for row, at, start, stop in loader.places(number):
                out[start:stop] = said[row, at : at + stop - start]
        if jax.process_index() == 0:
            known.write(place, part, of, out)
        return known.Known(out)

    def _stored(self, folder: Path, examples: Examples, part: str) -> topk.Stored:
        """A teacher's likeliest tokens."""
        config, section = self.config, self.config.teacher
        place = (folder / TEACHER if section.stored is None else Path(section.stored)) / part
        room, temperature = config.data.max_length - self._reserved, config.objective.value.temperature
        if section.path is None:
            return topk.read(place, topk.about(examples, "", section.top_k, temperature, 0, room))
        taught = teacher(config, self.how.mesh, self.dtype)
        common = distil.shared_vocabulary(self.base.config, self.base.tokenizer, taught.config, taught.tokenizer)
        print_ = disk.identity(taught.params)["checksum"]
        of = topk.about(examples, print_, section.top_k, temperature, common, room)
        how = {"dtype": self.dtype, "temperature": temperature, "vocabulary": common, "execution": self.how}
        top, put = jax.jit(topk_.make_top(taught.config, section.top_k, **how)), mesh_.placer(self.how.mesh)

        def said(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            placed = put(prefetch.split(batch, 1))
            return top(taught.params, {name: value[0] for name, value in placed.items()})

        def told(done: int, files: int) -> None:
            self.console.print(f"teacher: {part}, {done} of {files} files in {place}")

        topk_.store(place, examples, of, said, rows=mesh_.row_shards(self.how.mesh), told=told)
        return topk.read(place, of)
