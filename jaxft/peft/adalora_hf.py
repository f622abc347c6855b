"""AdaLoRA in peft's format: ``M.lora_A`` [r, in], ``M.lora_E`` [r, 1] and ``M.lora_B`` [out, r] of each module.

Only triplets that are left are stored; ``rank_pattern`` says which of the first ``init_r`` they were. Here a pruned
triplet has the singular value 0; read from a file, its column and row are 0 too.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.core import tree
from jaxft.core.names import Names
from jaxft.peft import disk
from jaxft.peft.adalora import AdaLoRA, AdaLoRAWeight
from jaxft.peft.disk import AdapterError, Tensors
from jaxft.peft.formats import Fields, Format

A, E, B = "lora_A", "lora_E", "lora_B"
PATTERN = "rank_pattern"


@dataclass(frozen=True)
class Stored(AdaLoRA):
    """As a file holds it: the triplets that it has are there from the start."""

    kept: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """bool[init_rank] by torch module; all, of a module that is not named."""

    def wrap(self, site):
        whole = np.ones(self.init_rank, bool)
        left = np.stack([self.kept.get(module, whole) for module in site.modules])
        w = super().wrap(site)
        return dataclasses.replace(w, e=jnp.asarray(left.reshape(w.e.shape)) * site.gate[..., None])


def config_of(config: Fields) -> Stored:
    """Our settings from peft's."""
    init_rank = config.get("init_r", 12)
    alpha = config.get("lora_alpha", 8)
    return Stored(
        rank=min(config.get("target_r", 8), init_rank),
        init_rank=init_rank,
        alpha=alpha if alpha > 0 else init_rank,
        dropout=float(config.get("lora_dropout", 0.0)),
        kept={module: np.ravel(left).astype(bool) for module, left in (config.get(PATTERN) or {}).items()},
    )


def prepare(where: object, config: Fields, tensors: Tensors, params: tree.Params) -> Fields:
    """The config with the modules of its rank pattern named as ours are."""
    del params
    pattern, size = config.get(PATTERN) or {}, config.get("init_r", 12)
    named = {key.removeprefix(disk.PREFIX).split(f".{E}")[0]: left for key, left in pattern.items()}
    for module, left in named.items():
        if np.size(left) != size or f"{module}.{E}" not in tensors:
            got = f"{np.size(left)} values for {module}"
            raise AdapterError(f"{where}: {PATTERN}", got, f"{size} (init_r) for each module that has tensors")
    return {**config, PATTERN: named}


def describe(w: AdaLoRAWeight) -> Fields:
    """What all modules have in common. peft asks for a schedule; there is none to come."""
    fields = {"lora_dropout": w.rate, "init_lora_weights": True, "tinit": 0, "tfinal": 0, "total_step": 1}
    return fields | {"init_r": w.e.shape[-1], "target_r": w.e.shape[-1]}


def values(w: AdaLoRAWeight) -> Fields:
    """Alpha of one layer, the same in all: a round number wherever one gives the scale."""
    size = w.e.shape[-1] + 1e-5
    exact = float(w.scale) * size
    rounded = (n for n in (round(exact), round(exact, 3), round(exact, 6)) if np.float32(n / size) == w.scale)
    return {"lora_alpha": next(rounded, exact)}


def pattern(config: Fields, found: dict[str, Any], names: Names) -> Fields:
    """Which triplets of each module are left, if any module has lost one."""
    del config
    left: dict[str, list[bool]] = {}
    for name in names:
        if name.path in found:
            e, adapted = (np.atleast_1d(np.asarray(a)) for a in (found[name.path].e, found[name.path].adapted))
            e = e.reshape(len(adapted), -1)
            left |= {f"{m}.{E}": (e[i] != 0).tolist() for i, m in enumerate(name.modules(len(e))) if adapted[i]}
    return {PATTERN: None if all(map(all, left.values())) else left}


def write(w: AdaLoRAWeight) -> Tensors:
    """The triplets of one layer that are left."""
    a, e, b = (np.asarray(array) for array in (w.a, w.e, w.b))
    left = e != 0
    return {A: a[:, left].T, E: e[left][:, None], B: b[left].T}


def read(w: AdaLoRAWeight, tensors: Tensors) -> AdaLoRAWeight:
    """One layer with its triplets where they were."""
    a, e, b = (np.zeros_like(array) for array in (w.a, w.e, w.b))
    left = np.asarray(w.e) != 0
    a[:, left], e[left], b[left] = tensors[A].T, tensors[E][:, 0], tensors[B].T
    return dataclasses.replace(w, a=a, e=e, b=b)


FORMAT = Format(
    peft_type="ADALORA",
    leaf=AdaLoRAWeight,
    fields=(
        "r", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        "rank_pattern", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out",
        "layers_to_transform", "layers_pattern", "init_lora_weights", "megatron_core", "qalora_group_size",
        "runtime_config", "eva_config", "corda_config", "lora_ga_config",
        # LoRA's, which peft's AdaLoRA takes and never reads
        "use_rslora", "alpha_pattern", "lora_bias",
    ),
    config=config_of,
    describe=describe,
    suffixes=(A, E, B),
    write=write,
    read=read,
    values=values,
    of_all=pattern,
    prepare=prepare,
)  # fmt: skip
