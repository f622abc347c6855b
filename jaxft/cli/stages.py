"""What a pipeline file says: stages in order, each with the whole config that it runs with.

    run_dir: runs/pipeline
    defaults: {model: {path: assets/tiny}}     # keys that every stage begins with
    stages:
      domain: {data: {path: ...}}              # sections of a config, as in a file of their own
      sft: {config: quickstart, take: merge}   # a config file or shipped recipe, and keys over it
      dpo: {config: dpo, take: stack, optim: {lr: 1.0e-3}}

All of it is resolved before anything runs: where a stage's model will be is known from the stages before it.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft import recipes, run_dir
from jaxft.border import check, fields, reading
from jaxft.border.errors import ConfigError
from jaxft.border.reading import Source, Typed
from jaxft.cli import critic, forgetting, handover, others, rollouts, written
from jaxft.cli.critique import CritiqueConfig
from jaxft.cli.handover import MERGED, Take
from jaxft.cli.judge import JudgeConfig
from jaxft.cli.teach import TeachConfig
from jaxft.config import RunConfig

TRAIN = "train"
KINDS: dict[str, type] = {
    TRAIN: RunConfig,
    "generate": TeachConfig,
    "critique": CritiqueConfig,
    "judge": JudgeConfig,
}
"""The config of each kind of stage; all but those that train write rows."""
TOP, OWN = ("run_dir", "defaults", "stages"), ("kind", "config", "take")
STAGE = "stage:"
"""What a value begins with that names an earlier stage: `stage:teacher` is the model it made, or the rows that it
wrote; `stage:teacher/FILE` is a file in its folder."""
TAGS = {"peft": "method", "objective": "name"}


@dataclass(frozen=True)
class Stage:
    """One run of a pipeline."""

    name: str
    kind: str
    take: Take
    folder: Path
    config: Any
    """That of its kind."""
    before: "Stage | None"
    """The stage whose model it takes."""
    merges: tuple[Path, ...]
    """Runs whose adapter must be merged before it begins."""
    left: tuple[str, ...]
    """What its config says and a stage that takes a model does not use."""

    @property
    def scores(self) -> bool:
        """Whether it trains a reward model."""
        return self.kind == TRAIN and handover.scores(self.config)

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """Tokens that this stage and those before it have added to the vocabulary."""
        return (*(self.before.new_tokens if self.before else ()), *self.config.model.new_tokens)

    @property
    def model(self) -> Path:
        """The whole model that comes out of it, merged if need be."""
        return self.folder / (run_dir.WHOLE if handover.whole(self.config) else MERGED)

    @property
    def result(self) -> Path:
        """What is there when it has ended."""
        if self.kind != TRAIN:
            return self.folder / written.ROWS
        return self.folder / (run_dir.WHOLE if handover.whole(self.config) else run_dir.ADAPTER)


@dataclass(frozen=True)
class Pipeline:
    """The stages, in order, and the folder that they share."""

    folder: Path
    stages: tuple[Stage, ...]


def is_pipeline(file: Path) -> bool:
    """Whether a config file is one of stages."""
    return "stages" in reading.read(file).values


def read(file: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a file. Of the overrides, `stages.NAME.key=value` is for one stage, `key=value` for all that have
    such a key. Raises ConfigError."""
    ours = [word for word in overrides if word.partition("=")[0].split(".")[0] in TOP]
    source = reading.read(file)
    named = _opened(source.values.get("stages"))
    if not isinstance(named, dict) or not named:
        raise ConfigError(f"{file}: `stages`: expected a mapping of names to stages, got {check.show(named)}")
    _refuse_unknown([word.split(".")[1] for word in ours if word.startswith("stages.")], named, "stages")
    source = reading.over(source, ours)
    _refuse_unknown(source.values, TOP, "")
    for name in named:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"`stages.{name}`: a stage's name is letters, digits, - and _")
    every = [word for word in overrides if word not in ours]
    known = {field.name for cls in KINDS.values() for field in fields.fields(cls)}
    for keys, what in (
        (_mapping(source, "defaults"), "defaults"),
        ([w.split("=")[0].split(".")[0] for w in every], ""),
    ):
        _refuse_unknown(keys, known, what)
    folder = Path(str(_opened(source.values.get("run_dir")) or f"runs/{file.stem}"))
    made: list[Stage] = []
    for number, name in enumerate(named, 1):
        try:
            made.append(_stage(source, file, name, folder / f"{number:02}-{name}", every, made))
        except (ConfigError, ValueError) as error:
            raise ConfigError("\n".join(f"stage {name}: {line}" for line in str(error).splitlines())) from None
    return Pipeline(folder, tuple(made))


def _stage(source: Source, file: Path, name: str, folder: Path, every: Sequence[str], made: Sequence[Stage]) -> Stage:
    own = _below(source, ("stages", name))
    kind = str(_opened(own.values.get("kind", TRAIN)))
    if kind not in KINDS:
        raise ConfigError(f"`kind`: got {kind!r}; expected one of {', '.join(KINDS)}")
    wanted = {field.name for field in fields.fields(KINDS[kind])}
    base = _written(_opened(own.values.get("config")), file)
    take = _opened(own.values.get("take"))
    own = Source({key: value for key, value in own.values.items() if key not in OWN}, own.places)
    if taken := [key for key in ("run_dir", "resume", "sweep") if key in own.values]:
        raise ConfigError(f"`{taken[0]}`: a stage has none of its own; leave it out")
    shared = _below(source, ("defaults",))
    shared = Source({key: value for key, value in shared.values.items() if key in wanted}, shared.places)
    laid = _laid(_laid(shared, base), own)
    reading.over(laid, [word for word in every if word.split("=")[0].split(".")[0] in wanted])
    laid.values |= {"run_dir": str(folder), "resume": True}
    merges = list[Path]()
    laid.values = _resolved(laid.values, made, merges)
    before = next((stage for stage in reversed(made) if stage.kind == TRAIN), None)
    left = ()
    if kind != TRAIN:
        if take not in (None, "none"):
            key = "teacher.path" if kind == "generate" else "policy.path"
            raise ConfigError(f"`take`: got {take!r}; a stage that writes rows names its model itself: {key}")
        how: Take = "none"
    else:
        how = handover.how(take, None if before is None else before.config)
        if before is not None and how != "none":
            left = handover.lay(laid, own, how, before.config, before.folder, before.new_tokens)
            merges += [before.folder] if how == "merge" and not handover.whole(before.config) else []
    config = check.build(KINDS[kind], laid)
    if isinstance(config, RunConfig):
        _check(config)
        if before is not None and how != "none":
            handover.check(config, how, before.config, before.name)
    return Stage(name, kind, how, folder, config, None if how == "none" else before, (*dict.fromkeys(merges),), left)


def _check(config: RunConfig) -> None:
    """Raises ConfigError for what would be refused when the stage begins, and for what no stage can do."""
    if config.sweep:
        raise ConfigError("`sweep`: a stage is one run; leave it out")
    if not config.data.given:
        raise ConfigError("`data.path` must be given: a file or data set to train on")
    if config.checkpoint.keep_last == 0:
        raise ConfigError(
            "`checkpoint.keep_last`: got 0; a stage goes on from its last checkpoint: expected at least 1"
        )
    others.check(config)
    forgetting.check(config)
    rollouts.check(config)
    critic.check(config)


def _written(config: Any, file: Path) -> Source:
    """The config file that a stage begins with: beside the pipeline, in the working folder, or a shipped one."""
    if config is None:
        return Source()
    if not isinstance(config, str):
        raise ConfigError(f"`config`: expected a file or a shipped recipe, got {check.show(config)}")
    beside = file.parent / config
    found = reading.read(beside if beside.is_file() else recipes.find(config))
    if "stages" in found.values:
        raise ConfigError(f"`config`: {config} is a pipeline itself; expected the config of one run")
    kept = {key: value for key, value in found.values.items() if key not in ("run_dir", "resume")}
    return Source(kept, found.places)


def _laid(below: Source, above: Source) -> Source:
    """Keys over keys; another method or objective stands in place of the one below with all its settings."""
    values = dict(below.values)
    for section, value in above.values.items():
        under, over, tag = _opened(values.get(section)), _opened(value), TAGS.get(section)
        if tag is not None and isinstance(over, dict):
            under = {tag: under} if isinstance(under, str) else under
            if isinstance(under, list) and tag not in over:
                raise ConfigError(f"`{section}`: the config below has a list; give the whole list again")
            names = [_opened(each.get(tag)) for each in (under, over) if isinstance(each, dict) and tag in each]
            under = None if len(names) == 2 and names[0] != names[1] else under
        values[section] = _merged(under, over) if isinstance(under, dict) and isinstance(over, dict) else value
    return Source(values, {**below.places, **above.places})


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    found = dict(under)
    for key, value in over.items():
        a, b = _opened(found.get(key)), _opened(value)
        found[key] = _merged(a, b) if isinstance(a, dict) and isinstance(b, dict) else value
    return found


def _resolved(value: Any, made: Sequence[Stage], merges: list[Path]) -> Any:
    """The values with the names of stages replaced by paths; adapters that must be merged for it are noted."""
    if isinstance(value, Typed):
        value = dataclasses.replace(value, value=_resolved(value.value, made, merges))
        return dataclasses.replace(value, text=value.value) if value.text.startswith(STAGE) else value
    if isinstance(value, dict):
        return {key: _resolved(each, made, merges) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each, made, merges) for each in value]
    if not isinstance(value, str) or not value.startswith(STAGE):
        return value
    name, _, rest = value.removeprefix(STAGE).partition("/")
    found = {stage.name: stage for stage in made}.get(name)
    if found is None:
        raise ConfigError(f"{value!r}: no stage {name!r} before this one; there are {[s.name for s in made] or 'none'}")
    if rest:
        return str(found.folder / rest)
    if found.kind != TRAIN:
        return str(found.result)
    if found.model != found.result:
        handover.refuse_merge(found.config, found.name)
        merges.append(found.folder)
    return str(found.model)


def _below(source: Source, path: tuple[str, ...]) -> Source:
    """What stands at a path, as a source of its own."""
    here: Any = source.values
    for part in path:
        here = _opened((here or {}).get(part))
    if here is not None and not isinstance(here, dict):
        raise ConfigError(f"`{'.'.join(path)}`: expected a mapping, got {check.show(here)}")
    places = {k[len(path) :]: place for k, place in source.places.items() if k[: len(path)] == path and k != path}
    return Source(dict(here or {}), places)


def _mapping(source: Source, key: str) -> dict[str, Any]:
    return _below(source, (key,)).values


def _opened(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def _refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    known = [*known]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            meant = f"; did you mean `{near[0]}`?" if near else f"; expected one of {', '.join(sorted(known))}"
            raise ConfigError(
                f"`{f'{where}.' if where else ''}{key}`: no such {'stage' if where == 'stages' else 'key'}{meant}"
            )
