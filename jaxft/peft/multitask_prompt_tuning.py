r"""Multitask prompt tuning: one prompt shared by all tasks, times a low-rank matrix of each task.

.. math:: P_k = P \circ (u_k v_k), \qquad P \in \mathbb{R}^{n \times D},\ u_k \in \mathbb{R}^{n \times r},\
          v_k \in \mathbb{R}^{r \times D}

Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", eq. 1 (arXiv:2303.02861),
with peft's rank r (the paper's is 1). It trains n D + tasks (n + D) r parameters. Which task a row belongs to is said
by the column that `data.task_column` names; without one, all rows are of task 0.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.weight import Slot, trainable, weight
from jaxft.peft import disk, prompt_tuning, slot_formats
from jaxft.peft.prompt_tuning import PromptTuning
from jaxft.peft.slot_formats import ROWS
from jaxft.peft.slots import Host

COLUMNS, TASK_ROWS = "prefix_task_cols", "prefix_task_rows"


@dataclass(frozen=True)
class MultitaskPromptTuning(PromptTuning):
    """A learnt prompt for each of several tasks, most of it shared. Default learning rate 3e-2."""

    tasks: int = 1
    """Number of tasks."""
    rank: int = 1
    """Rank r of each task's matrix."""
    source: str = ""
    """Folder of an earlier multitask prompt, for the second stage of the paper: `init` is not used then."""
    source_task: int | Literal["average", "none"] = "average"
    """What becomes of the source's tasks: every task here starts from their average, from one of them (its number), or
    anew (only the shared prompt is taken)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("tasks", "rank"):
            if getattr(self, field) < 1:
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected at least 1")

    def make(self, model: Host, params: tree.Params, key: jax.Array) -> Slot:
        rows_key, left_key, right_key = jax.random.split(key, 3)
        rows = prompt_tuning.initial(self, model, params, rows_key)
        left = _near_one(left_key, (self.tasks, self.tokens, self.rank), 2)
        right = _near_one(right_key, (self.tasks, self.rank, rows.shape[-1]), 1)
        slot = MultitaskPrompt(rows, left, right)
        return _from_source(slot, self) if self.source else slot


@weight
class MultitaskPrompt(Slot):
    """``value * (left @ right)`` for each task. value: [n, D]; left: [tasks, n, r]; right: [tasks, r, D]."""

    value: jax.Array = trainable()
    left: jax.Array = trainable()
    right: jax.Array = trainable()

    @property
    def shape(self):
        return (self.left.shape[-3], *self.value.shape)

    def dense(self):
        return self.value * (self.left @ self.right)


def _near_one(key: jax.Array, shape: tuple[int, ...], rank_axis: int) -> jax.Array:
    """Normal with deviation 0.02, plus 1 in the first rank: every task starts near the shared prompt.

    (peft leaves the 1 out, so that its prompts start near zero.)"""
    ones = jnp.zeros(shape).at[(slice(None),) * rank_axis + (0,)].set(1.0)
    return 0.02 * jax.random.normal(key, shape) + ones


def _from_source(slot: MultitaskPrompt, config: MultitaskPromptTuning) -> MultitaskPrompt:
    """The slot with what the source learnt in place of what was drawn."""
    _, tensors = disk.read(Path(config.source).expanduser())
    names = {"value": ROWS, "left": COLUMNS, "right": TASK_ROWS}
    missing = [name for name in names.values() if f"/{name}" not in tensors]
    if missing:
        raise ValueError(f"peft.source: {config.source} has no {', '.join(missing)}; expected a multitask prompt")
    found = {field: tensors[f"/{name}"].astype(np.float32) for field, name in names.items()}
    known = len(found["left"])
    if config.source_task == "none":
        found = {"value": found["value"]}
    elif config.source_task == "average":
        found |= {field: found[field].mean(0, keepdims=True) for field in ("left", "right")}
    elif 0 <= config.source_task < known:
        found |= {field: found[field][config.source_task][None] for field in ("left", "right")}
    else:
        raise ValueError(f"peft.source_task: got {config.source_task}; {config.source} has tasks 0 to {known - 1}")
    for field, array in found.items():
        own = getattr(slot, field)
        if array.shape[-2:] != own.shape[-2:]:
            raise ValueError(
                f"peft.source: {config.source} has {names[field]} of shape {list(array.shape)}; expected "
                f"{list(own.shape)}: the same model, and the same tokens and rank"
            )
    # `+ 0` makes a buffer of its own, not one that tasks share
    return dataclasses.replace(slot, **{f: jnp.broadcast_to(a, getattr(slot, f).shape) + 0 for f, a in found.items()})


def _shapes(config: dict[str, Any], params: tree.Params) -> slot_formats.Shapes:
    n, width = config.get("num_virtual_tokens"), slot_formats.features(params)
    tasks, rank = config.get("num_tasks", 1), config.get("num_ranks", 1)
    return {ROWS: (n, width), COLUMNS: (tasks, n, rank), TASK_ROWS: (tasks, rank, width)}


def _described(w: MultitaskPrompt) -> tuple[dict[str, Any], dict[str, Any]]:
    tasks, _, rank = w.left.shape
    fields = {"prompt_tuning_init": "RANDOM", "token_dim": w.value.shape[-1], "num_tasks": tasks, "num_ranks": rank}
    return fields, {ROWS: w.value, COLUMNS: w.left, TASK_ROWS: w.right}


FORMAT = dataclasses.replace(
    prompt_tuning.FORMAT,
    peft_type="MULTITASK_PROMPT_TUNING",
    leaf=MultitaskPrompt,
    own=(
        *prompt_tuning.INITS,
        "num_tasks",
        "num_ranks",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
    ),
    shapes=_shapes,
    write=_described,
    read=lambda config, tensors: MultitaskPrompt(tensors[ROWS], tensors[COLUMNS], tensors[TASK_ROWS]),
)
