"""One run's configuration: the sections, each a frozen dataclass that lives beside the code that reads it.

This file only composes them. A field's meaning is the docstring under it, which `--help` and the schema show.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxft.border import check, fields, reading
from jaxft.border import schema as schema_
from jaxft.border.fields import Choice
from jaxft.checkpoint.config import CheckpointConfig
from jaxft.data.config import DataConfig
from jaxft.objectives import OBJECTIVES
from jaxft.peft import METHODS, registry
from jaxft.quant.config import QuantConfig
from jaxft.rewards import REWARDS
from jaxft.rollout.config import RolloutConfig
from jaxft.rollout.generate import GenerateConfig
from jaxft.sharding.mesh import MeshConfig
from jaxft.training.config import EvalConfig, LogConfig, OptimConfig, TrainConfig

_METHODS = {**registry.installed(), **{name: method.config for name, method in METHODS.items()}}
_REWARDS = {name: reward.config for name, reward in REWARDS.items()}
_OBJECTIVES = {name: objective.config for name, objective in OBJECTIVES.items()}


@dataclass(frozen=True)
class ModelSection:
    """The model that is fine-tuned."""

    path: str
    """Folder or hub id of a Hugging Face model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    """Dtype of frozen weights and of the computation; what is trained is kept in float32. auto: the checkpoint's."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: only the architecture and the tokenizer are read from path, and the weights drawn anew."""
    new_tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary; their rows begin at the mean of the others, and trainable_tokens trains them."""
    vocab_multiple: int = 1
    """With new tokens, the embedding's rows are padded to a multiple of this."""
    pad_token: str | None = None
    """Token that fills up rows. Default: the tokenizer's own. A reward model needs one that no text ends in."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto chooses by platform and case."""


Packing = Literal["none", "nf4", "fp4", "int8", "fp8"]


@dataclass(frozen=True)
class ReferenceSection:
    """What a preference objective compares the policy with. By default the policy as the run began, which costs no
    second model."""

    path: str | None = None
    """Folder or hub id of another model as the reference; it must have the same tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantize: Packing = "none"
    """Few bits for the other model's weights."""
    precompute: bool = False
    """Whether its log-probabilities are found once before the first step and kept on disk: each step is then as cheap
    as without a reference, and another model leaves the memory before training begins."""
    stored: str | None = None
    """Folder of those log-probabilities, for several runs to share. Default: reference/ in the run's folder."""


@dataclass(frozen=True)
class TeacherSection:
    """The model that a distillation learns from."""

    path: str | None = None
    """Folder or hub id of the teacher."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Folder or hub id of an adapter on it."""
    quantize: Packing = "none"
    """Few bits for its weights."""
    stored: str | None = None
    """With objective.teacher=stored: folder of the teacher's likeliest tokens; what it lacks is found and written
    before the first step, for which path is needed. Default: teacher/ in the run's folder."""
    top_k: int = 64
    """How many of the teacher's tokens are stored at each place."""


@dataclass(frozen=True)
class ValueSection:
    """The value model that PPO trains beside the policy. By default adapters of its own and a head that scores, on the
    policy's very base: no second model is in memory."""

    path: str | None = None
    """What it begins from: the folder of a reward model's run, of its adapter or of the whole model, a hub id, or
    value/ in the folder of an earlier run. An adapter on the policy's own base stays on that base; all else is a model
    of its own, which must have the same tokenizer. A language model is given a head."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantize: Packing = "none"
    """Few bits for the frozen weights of a model of its own."""
    peft: tuple[Choice, ...] = fields.choice(
        "method", _METHODS, "lora", "Fine-tuning method.", several=True, load=registry.find, optional=True
    )
    """What of it trains; the head always does. Default: the policy's methods on the policy's base, all of a model of
    its own, and of an adapter that adapter."""
    head: Literal["zeros", "normal"] = "zeros"
    """Where a new head begins: zeros makes every value 0 at first, normal draws it as `transformers` does."""
    save: bool = False
    """Whether the value model is written at the end, to value/ in the run's folder: for another run to begin from."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelSection
    """The model that is fine-tuned."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data and its held-out part."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Few bits for the frozen weights (QLoRA): which, and how."""
    peft: tuple[Choice, ...] = fields.choice(
        "method", _METHODS, "lora", "Fine-tuning method.", several=True, load=registry.find
    )
    """What is trained: a method and its settings, or a list of them, applied in order."""
    objective: Choice = fields.choice("name", _OBJECTIVES, "sft", "Training objective.")
    """What is minimised: the objective and its settings."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """What an objective on the policy's own completions samples."""
    rewards: tuple[Choice, ...] = fields.choice(
        "name", _REWARDS, "function", "Reward function.", several=True, optional=True
    )
    """What judges completions: a list of reward functions with their settings and weights, {name: math} or
    {function: file.py:name} of one's own. Their weighted sum is learnt."""
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    """What a preference objective compares the policy with."""
    value: ValueSection = field(default_factory=ValueSection)
    """The value model of objective ppo."""
    teacher: TeacherSection = field(default_factory=TeacherSection)
    """The model that a distillation learns from."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser and its schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, in what batches, and how the step is computed."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on held-out data while training."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """How text is generated."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is shown and written while training."""
    sweep: tuple[str, ...] = ()
    """Members to train side by side on one copy of the model, all combinations of these values: peft.rank=8,16
    optim.lr=1e-4,3e-4 seed=0..3. The same as `--sweep`."""
    run_dir: str | None = None
    """Folder of the run: resolved config, metrics, checkpoints, samples. Default: runs/ with the config file's name."""
    resume: bool = False
    """Whether to go on from the last checkpoint in run_dir, if there is one. Otherwise an existing one is refused."""


def load(file: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file (none: the defaults) and `key=value` overrides. Raises ConfigError.

    A method or module among the overrides stands in place of the file's; settings of the file that it does not have
    are left out, which a line on stderr says."""
    config = check.build(RunConfig, reading.read(file, overrides), lambda line: print(line, file=sys.stderr))
    if config.run_dir is None:
        config = replace(config, run_dir=f"runs/{Path(file).stem if file else 'run'}")
    return config


def changed(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config with `key=value` overrides laid over it. Raises ConfigError."""
    return check.build(RunConfig, reading.over(reading.Source(check.plain(config)), overrides))


def dump(config: Any) -> str:
    """The whole config (a dataclass of sections) as YAML, which `load` reads back to an equal one."""
    return yaml.dump(check.plain(config), Dumper=reading.Dumper, sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """The JSON schema of a config file."""
    return schema_.schema(RunConfig, "jaxft run configuration")
