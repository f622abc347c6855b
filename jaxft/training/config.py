"""The `train`, `eval`, `log` and `optim` sections. Light: reading a config loads neither optax nor orbax."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what batches, and how the step is computed."""

    batch: int = 8
    """Rows in one forward and backward pass, over all devices together."""
    accumulate: int = 1
    """Passes summed into one optimiser step. The loss is the mean over all tokens of the step, so batch 8 x
    accumulate 1 and batch 1 x accumulate 8 are the same training."""
    steps: int | None = None
    """Optimiser steps. Default: what ``epochs`` makes."""
    epochs: float | None = None
    """Passes over the data. Default: 1, where ``steps`` is not given; give one of the two."""
    seed: int = 0
    """Of new parameters, dropout and noise. The order of the data has its own, ``data.seed``."""
    neftune_alpha: float = 0.0
    """Noise added to embeddings while training, of magnitude alpha / sqrt(length x width); 5 is usual. 0: none."""
    remat: Literal["none", "save", "attn", "full", "offload"] = "full"
    """What the backward pass recomputes to save memory: none keeps everything, save the large products, attn the
    attention's, full the input of each layer only, and offload that in the host's pinned memory. Never changes the
    result beyond rounding."""
    unroll: Literal["auto", "always", "never"] = "auto"
    """Whether layers are a Python loop instead of a scan: somewhat faster on a GPU, slower to compile. auto: on one
    GPU."""
    deterministic: bool = False
    """Whether a GPU may only use kernels that give the same bits every time; slower. CPU and TPU always do."""
    prefetch: int = 2
    """Batches sent to the device ahead of the step."""
    max_nonfinite: int = 3
    """Steps in a row with a loss or gradient that is not finite (each is skipped) after which the run stops."""

    def __post_init__(self) -> None:
        for field in ("batch", "accumulate", "max_nonfinite", "steps"):
            _refuse(self, "train", field, lambda value: value >= 1, "at least 1")
        _refuse(self, "train", "epochs", lambda value: value > 0, "a number above 0")
        for field in ("neftune_alpha", "prefetch"):
            _refuse(self, "train", field, lambda value: value >= 0, "at least 0")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out data while training."""

    every: int | None = None
    """Steps between evaluations. Default: once an epoch. There is always one at the end."""
    at_start: bool = False
    """Whether to evaluate before the first step too."""
    general: str | tuple[str, ...] | None = None
    """A set that says what the model knows besides the task, like ``data.path``, in any format and for any objective.
    Its ``general_nll`` and ``general_perplexity`` stand beside the held-out metrics, from before the first step on."""
    batches: int | None = None
    """Batches of held-out data to use, and of the general set. Default: all."""
    samples: int = 4
    """Held-out prompts answered at each evaluation, written to the run's samples. 0: none."""
    exact_match: int = 0
    """Held-out prompts answered greedily at each evaluation and compared with the data's answers: ``exact_match``."""
    rewards: int = 64
    """Of a run on rollouts: held-out prompts answered greedily at each evaluation and judged: ``reward``."""
    kl: bool = False
    """Of a run on rollouts: whether the policy as the run began is kept to tell ``kl`` of those answers, the divergence
    from it in nats, even where the objective compares with no reference. Where it does, ``kl`` is always told."""
    harmless: str | tuple[str, ...] | None = None
    """Of a run on rollouts: prompts that ask nothing wrong, like ``data.path``, answered as often: ``refusal_rate``."""
    refusals: tuple[str, ...] = (
        "I cannot", "I can't", "I am unable", "I'm unable", "I am not able", "I'm not able", "I am sorry", "I'm sorry",
        "I apologize", "I apologise", "I will not", "I won't", "I must decline", "As an AI",
    )  # fmt: skip
    """What a refusal says, whatever the case of its letters: one such phrase in an answer makes it one."""
    metric: str = "loss"
    """What decides which checkpoint is best, and early stopping: loss, perplexity, mean_token_accuracy, ... A run on
    rollouts has no held-out loss; there loss stands for reward, of which more is better."""
    goal: Literal["min", "max"] = "min"
    """Whether a lower or a higher metric is better."""
    patience: int | None = None
    """Evaluations in a row without improvement after which the run stops. Default: it never stops early."""
    min_delta: float = 0.0
    """Improvement smaller than this does not count for ``patience``."""

    def __post_init__(self) -> None:
        for field in ("every", "batches", "patience"):
            _refuse(self, "eval", field, lambda value: value >= 1, "at least 1, or null")
        for field in ("samples", "exact_match", "rewards", "min_delta"):
            _refuse(self, "eval", field, lambda value: value >= 0, "at least 0")


@dataclass(frozen=True)
class LogConfig:
    """What is shown and written while training. ``metrics.jsonl`` in the run's folder is always written."""

    every: int = 1
    """Steps between lines of metrics; each line is that step's own values."""
    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers to write to besides (``pip install 'jaxft[track]'``)."""
    project: str = "jaxft"
    """Project name in wandb and trackio."""
    name: str | None = None
    """Run name there. Default: the name of the run's folder."""
    progress: bool = True
    """Whether to show progress: a bar in a terminal, a line now and then elsewhere."""

    def __post_init__(self) -> None:
        _refuse(self, "log", "every", lambda value: value >= 1, "at least 1")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    name: Literal["adamw", "adamw_8bit", "adafactor", "lion", "muon", "schedule_free", "sgd"] = "adamw"
    """Optimiser. ``adamw_8bit`` keeps its moments in eight bits; ``schedule_free`` is schedule-free AdamW; ``muon``
    uses Adam for embeddings, the head and vectors."""
    lr: float | None = None
    """Peak learning rate. Default: that of the fine-tuning method (LoRA 2e-4, full 2e-5), times 0.2 for lion; sgd has
    no default."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] | None = None
    """Course of the learning rate after warm-up. Default: cosine; constant for schedule_free, which allows no other."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Default: ``warmup_ratio`` of the run."""
    warmup_ratio: float = 0.03
    """Share of the run that is warm-up, where ``warmup_steps`` is not given."""
    min_lr_ratio: float = 0.0
    """Final learning rate over peak learning rate."""
    decay_ratio: float = 0.1
    """Share of the run in which the ``wsd`` schedule decays."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate; norms, biases and vectors are spared."""
    betas: tuple[float, float] | None = None
    """Decay rates of the moments. Default: adamw, adamw_8bit and schedule_free (0.9, 0.999), lion (0.9, 0.99), muon
    (0.95 for its momentum, 0.999 for its Adam part), sgd (0.9 momentum, the second unused); adafactor has none."""
    eps: float = 1e-8
    """Added to the denominator by adamw, adamw_8bit, schedule_free and muon's Adam part."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; larger ones are scaled down. null: no clipping."""
    groups: dict[str, float] = dataclasses.field(default_factory=dict)
    """Learning-rate multipliers: a regex searched in parameter paths to a factor, the first match counts. LoRA+ is
    ``{"/b$": 16}``."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment (adamw, lion, muon, sgd). Second moments are float32 always: bfloat16 cannot hold their
    slow averages."""
    offload: bool = False
    """Whether the moments are kept in the host's pinned memory, and copied to the device and back inside each step.
    Never changes the result; saves 8 bytes a trained parameter (adamw), 2 with adamw_8bit."""

    l2_start: float = 0.0
    """Penalty for moving away from where the run began: half of this times the squared distance of all trained arrays
    from their start (L2-SP). For adapters the distance is that of their factors."""
    ewc: float = 0.0
    """Elastic weight consolidation: as ``l2_start``, each parameter weighed by how much the likelihood of ``ewc_data``
    depends on it, for a token; 1 weighs that text like the task's."""
    ewc_data: str | tuple[str, ...] | None = None
    """What must not be forgotten: text, or rows of any format, like ``data.path``. Not the set that measures it."""
    ewc_examples: int = 256
    """Documents of ``ewc_data`` that are looked at, one backward pass each, before the first step."""

    def __post_init__(self) -> None:
        for field in ("lr", "warmup_steps", "weight_decay", "min_lr_ratio", "l2_start", "ewc"):
            _refuse(self, "optim", field, lambda value: 0 <= value < math.inf, "a finite number, at least 0")
        for field in ("warmup_ratio", "decay_ratio"):
            _refuse(self, "optim", field, lambda value: 0 <= value <= 1, "a share of the run, 0 to 1")
        _refuse(
            self, "optim", "betas", lambda value: all(0 <= beta < 1 for beta in value), "decay rates from 0 to below 1"
        )
        for field in ("eps", "clip_norm"):
            _refuse(self, "optim", field, lambda value: value > 0, "a number above 0")
        _refuse(self, "optim", "ewc_examples", lambda value: value >= 1, "at least 1")
        if bool(self.ewc) != bool(self.ewc_data):
            got = f"ewc={self.ewc} and ewc_data={self.ewc_data}"
            raise ValueError(f"optim.ewc: got {got}; expected both: a strength, and the data not to be forgotten")


def _refuse(section: Any, name: str, field: str, fine: Callable[[Any], bool], expected: str) -> None:
    """Raises ValueError for a value (None is fine) that makes no sense."""
    value = getattr(section, field)
    if value is not None and not fine(value):
        raise ValueError(f"{name}.{field}: got {value}; expected {expected}")
