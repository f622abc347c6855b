"""Which weights a method adapts: Hugging Face module names, our paths, a regex, or ``all-linear``.

The rules are peft's: a list matches a module of that exact name or ending in ``.name``; a string is a full-match
regex over the module name; ``exclude`` is applied first; layer indices restrict what a list matches by its end;
rank and alpha patterns match the end of a module name. Our paths (``layers/attn/q``) are accepted as well. Our layers
are stacked, so a match is a boolean for each layer. Unlike peft, each target that matches nothing is an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.core.names import Name, Names

Targets = str | tuple[str, ...]
ADAPTABLE = ("linear", "conv1d", "embedding")


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
    saved: Sequence[str] = (),
    kinds: tuple[str, ...] = ADAPTABLE,
) -> list[Target]:
    """The weights of these kinds that ``targets`` selects; ``saved`` modules are trained whole and so never adapted.

    Raises ValueError naming each target that selects nothing, and each layer that the model does not have."""
    if any(not 0 <= index < num_layers for index in layers or ()):
        raise ValueError(f"peft.layers: got {list(layers or ())}; expected indices from 0 to {num_layers - 1}")
    targets = targets if isinstance(targets, str) else tuple(targets)
    each = (
        of_row(name, num_layers, targets, exclude=exclude, layers=layers, saved=saved, kinds=kinds) for name in names
    )
    found = [target for target in each if target is not None]
    _refuse_unmatched("targets", targets, found, names, num_layers, kinds)
    return found


def of_row(
    name: Name,
    num_layers: int,
    targets: Targets,
    *,
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    saved: Sequence[str] = (),
    kinds: tuple[str, ...] = ADAPTABLE,
) -> Target | None:
    """What ``targets`` selects of one row, by peft's rules; None for nothing."""
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    if name.kind not in kinds or (everything and (name.kind == "embedding" or name.path in ("head", "score"))):
        return None
    modules = name.modules(num_layers)
    hit = np.array([
        (everything or matches(m, name.path, targets))
        and not (exclude and matches(m, name.path, exclude))
        and not any(re.match(rf"(^|.*\.){s}($|\..*)", m) for s in saved)
        and (layers is None or _in_layers(name, i, m, targets, layers))
        for i, m in enumerate(modules)
    ])  # fmt: skip
    return Target(name, hit if name.stacked else hit[0], modules) if hit.any() else None


def find_whole(names: Names, num_layers: int, modules: Sequence[str]) -> list[Name]:
    """The rows (norms too) that ``modules``, peft's ``modules_to_save``, selects; also all rows inside a module.

    peft compares plain endings: ``norm`` means ``model.norm`` and every ``..._layernorm`` too. Raises ValueError for
    a module that selects nothing or only some layers of a stack."""
    chosen = []
    unused = set(modules)
    for name in names:
        hits = [
            {m for m in modules if _inside(one, m) or matches(one, name.path, (m,))} for one in name.modules(num_layers)
        ]
        if any(hits) and not all(hits):
            raise ValueError(
                f"peft.modules_to_save: {list(modules)} selects layers {[i for i, h in enumerate(hits) if h]} of "
                f"{name.path} ({num_layers} layers); a module is trained whole in every layer or in none"
            )
        if any(hits):
            chosen.append(name)
            unused.difference_update(*hits)
    if unused:
        _refuse("modules_to_save", tuple(sorted(unused)), names, num_layers, ("norm", *ADAPTABLE))
    return chosen


def _inside(module: str, ending: str) -> bool:
    """Whether ``module``, or one that contains it, ends in ``ending``."""
    parts = module.split(".")
    return any(".".join(parts[:n]).endswith(ending) for n in range(1, len(parts) + 1))


def _in_layers(name: Name, index: int, module: str, targets: Targets, layers: Sequence[int]) -> bool:
    """peft's layers_to_transform: a full module name in a list is taken whatever its layer; one without is not."""
    exact = not isinstance(targets, str) and module in targets
    return exact or (name.stacked and index in layers)


def _refuse_unmatched(
    field: str, targets: Targets, found: list[Target], names: Names, num_layers: int, kinds: tuple[str, ...]
) -> None:
    if isinstance(targets, str):
        missing = () if found else (targets,)
    else:
        missing = tuple(
            t for t in targets if not any(matches(m, f.name.path, (t,)) for f in found for m in f.modules)
        )  # fmt: skip
    if missing or not found:
        _refuse(field, missing, names, num_layers, kinds)


def _refuse(field: str, missing: tuple[str, ...], names: Names, num_layers: int, kinds: tuple[str, ...]) -> None:
    known = sorted({n.module.rsplit(".", 1)[-1] for n in names if n.kind in kinds})
    raise ValueError(
        f"peft.{field}: {', '.join(map(repr, missing)) or 'the empty list'} selects no weight of this model "
        f"({num_layers} layers). Known modules: {', '.join(known)}. Use those names or our paths "
        f"({', '.join(sorted(n.path for n in names if n.kind in kinds))})"
        + ("" if field == "modules_to_save" else ", a regex over the whole module name, or 'all-linear'")
        + "."
    )


def pattern_values(modules: Sequence[str], pattern: dict[str, float], default: float) -> np.ndarray:
    """Per module the first value of ``pattern`` whose key matches its end (peft's ``rank_pattern``), else default."""

    def value(module: str) -> float:
        return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    return np.array([value(m) for m in modules])


def describe(
    chosen: dict[str, np.ndarray],
    names: Names,
    num_layers: int,
    by_index: bool = True,
    kinds: tuple[str, ...] = ADAPTABLE,
) -> tuple[list[str], list[int] | None]:
    """The shortest (target_modules, layers_to_transform) with which peft selects exactly ``chosen``.

    ``chosen``: by path, the layers adapted (bool[L] or bool[]). ``by_index``: whether the method's config can choose
    layers; otherwise modules are listed by their full names."""
    rows = [name for name in names if name.path in chosen]
    full = sorted(m for n in rows for m in adapted(n, num_layers, chosen[n.path]))
    stacked = [tuple(chosen[n.path]) for n in rows if n.stacked]
    layers = None if all(all(hits) for hits in stacked) else [i for i, hit in enumerate(stacked[0]) if hit]
    if len(set(stacked)) > 1 or (layers is not None and (len(stacked) < len(rows) or not by_index)):
        return full, None
    endings = sorted({ending(name, names) for name in rows})
    found = find(names, num_layers, tuple(endings), layers=layers, kinds=kinds)
    exact = {t.name.path for t in found} == set(chosen) and all((t.layers == chosen[t.name.path]).all() for t in found)
    return (endings, layers) if exact else (full, None)


def ending(name: Name, names: Names, dot: str = ".") -> str:
    """The shortest ending of a row's module name, in whole parts, that no other row's module has.

    ``dot``: what precedes it where it matches; nothing for modules_to_save, which peft compares as plain text."""
    others = [other.module.format(0) for other in names if other.path != name.path]
    parts = name.module.split(".")
    own = parts[parts.index("{}") + 1 :] if name.stacked else parts
    for n in range(1, len(own) + 1):
        text = ".".join(own[-n:])
        if not any(other == text or other.endswith(dot + text) for other in others):
            return text
    return ".".join(own)


def patterns(chosen: dict[str, np.ndarray], names: Names, num_layers: int, values: dict[str, Any]) -> dict[str, Any]:
    """``values`` by full module name, shortened as peft's rank and alpha patterns: by ending where all layers agree."""
    found: dict[str, Any] = {}
    for name in names:
        if name.path in chosen:
            modules = adapted(name, num_layers, chosen[name.path])
            distinct = {values[m] for m in modules}
            found |= (
                {ending(name, names): v for v in distinct} if len(distinct) == 1 else {m: values[m] for m in modules}
            )
    return found


def adapted(name: Name, num_layers: int, layers: np.ndarray) -> list[str]:
    """Modules of the layers (bool[L] or bool[]) of one row."""
    return [m for m, hit in zip(name.modules(num_layers), np.atleast_1d(layers), strict=True) if hit]


def refuse_unused(field: str, pattern: Mapping[str, float], found: Sequence[Target]) -> None:
    """Raises ValueError naming the keys of a rank or alpha pattern that match no adapted module."""
    modules = [module for target in found for module in target.modules]
    unused = [key for key in pattern if not any(re.fullmatch(rf"(.*\.)?({key})$", module) for module in modules)]
    if unused:
        known = sorted({module.rsplit(".", 1)[-1] for module in modules})
        raise ValueError(
            f"peft.{field}: {', '.join(map(repr, unused))} matches no adapted module; expected regexes for the end of "
            f"names such as {modules[0]!r}; adapted are {', '.join(known)}"
        )
