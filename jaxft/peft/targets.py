"""Which weights a method adapts: Hugging Face module names, our paths, a regex, or ``all-linear``.

The rules are peft's: a list matches a module of that exact name or ending in ``.name``; a string is a full-match
regex over the module name; ``exclude`` is applied first; rank and alpha patterns match the end of a module name.
Our layers are stacked, so a match is a boolean for each layer. A target that matches nothing is an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.core.names import Name, Names

Targets = str | tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """One weight to adapt: its name row and, per layer, whether it is adapted."""

    name: Name
    layers: np.ndarray
    """bool[L] for a stacked weight, bool[] for a single one."""
    modules: tuple[str, ...]
    """Torch module name of each layer."""


def matches(module: str, path: str, targets: Targets) -> bool:
    """Whether one module (its torch name, and our path) is meant by ``targets``."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module)) or targets == path
    return any(module == t or module.endswith("." + t) or path == t or path.endswith("/" + t) for t in targets)


def find(
    names: Names,
    num_layers: int,
    targets: Targets,
    *,
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    kinds: tuple[str, ...] = ("linear", "conv1d", "embedding"),
) -> list[Target]:
    """The weights that ``targets`` selects. Raises ValueError naming each target that selects nothing."""
    targets = targets if isinstance(targets, str) else tuple(targets)
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    found: list[Target] = []
    for name in names:
        if name.kind not in kinds or (everything and (name.kind == "embedding" or name.path == "head")):
            continue
        modules = name.modules(num_layers)
        hit = np.array([
            (everything or matches(m, name.path, targets))
            and not (exclude and matches(m, name.path, exclude))
            and (layers is None or not name.stacked or i in layers)
            for i, m in enumerate(modules)
        ])  # fmt: skip
        if hit.any():
            found.append(Target(name, hit if name.stacked else hit[0], modules))
    _refuse_unmatched(targets, found, names, num_layers, everything)
    return found


def _refuse_unmatched(targets: Targets, found: list[Target], names: Names, num_layers: int, everything: bool) -> None:
    wanted = (targets,) if isinstance(targets, str) else targets
    missing = [
        t
        for t in wanted
        if not (everything and found)
        and not any(matches(m, f.name.path, t if isinstance(targets, str) else (t,)) for f in found for m in f.modules)
    ]
    if missing or not found:
        known = sorted({n.module.rsplit(".", 1)[-1] for n in names if n.kind != "norm"})
        raise ValueError(
            f"peft.targets: {', '.join(map(repr, missing)) or repr(targets)} matches no weight of this model "
            f"({num_layers} layers). Known modules: {', '.join(known)}. Use those names, our paths "
            f"({', '.join(sorted(n.path for n in names if n.kind != 'norm'))}), a regex, or 'all-linear'."
        )


def pattern_values(modules: Sequence[str], pattern: dict[str, float], default: float) -> np.ndarray:
    """Per module the first value of ``pattern`` whose key matches its end (peft's ``rank_pattern``), else default."""

    def value(module: str) -> float:
        return next((v for k, v in pattern.items() if re.fullmatch(rf"(.*\.)?({k})$", module)), default)

    return np.array([value(m) for m in modules])
