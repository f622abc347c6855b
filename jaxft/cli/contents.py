"""What an adapter's directory holds, told from its two files without its model.

Tensors are read one at a time and forgotten: of each group of like modules there remain shapes, sizes and norms. Of
LoRA the norm of the update itself is told, ``|| s A B ||`` (Frobenius), which costs a product of rank width only.
"""

import collections
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.checkpoint import tensorfile
from jaxft.checkpoint.errors import CheckpointError
from jaxft.checkpoint.tensorfile import Reader, Tensor
from jaxft.peft import disk, hf, native, norms, targets
from jaxft.peft.disk import AdapterError
from jaxft.peft.formats import Format

ROWS = "trainable_tokens_delta"  # the end of the tensors that hold rows of single tokens
ENDS = (
    "base_layer.weight", "base_layer.bias", f"{norms.SUFFIX}.weight", f"{norms.SUFFIX}.bias", f"token_adapter.{ROWS}",
)  # fmt: skip
PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
APART = (  # fields that are told elsewhere, or by every adapter alike
    "auto_mapping", "base_model_name_or_path", "format", "inference_mode", "leaves", "megatron_core", "methods",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip


@dataclass
class Group:
    """Tensors of modules that differ by their layer only."""

    modules: str
    """Such as model.layers.{0-15}.self_attn.q_proj."""
    count: int = 0
    tensors: dict[str, str] = field(default_factory=dict)
    """What each is called after its module: dtype and shape, a range of sizes where they differ."""
    parameters: int = 0
    """Floating numbers that are stored, constants of the method among them."""
    bytes: int = 0
    rms: dict[str, float] = field(default_factory=dict)
    """Root mean square of the numbers of each tensor, over all modules."""
    update: tuple[float, float] | None = None
    """Smallest and largest norm of what a module adds to its weight; of LoRA and AdaLoRA."""


@dataclass
class Contents:
    """All that is told of an adapter."""

    path: str
    format: str
    """peft's or jaxft's, with the name there."""
    method: str | None
    """Ours; None for one that jaxft does not have."""
    base_model: str | None
    settings: dict[str, Any]
    """Fields of its config that say something."""
    groups: list[Group] = field(default_factory=list)
    parameters: int = 0
    bytes: int = 0
    modules_to_save: list[str] = field(default_factory=list)
    token_rows: int = 0
    """Rows of single tokens, trained and stored alone."""
    problems: list[str] = field(default_factory=list)
    """What would keep it from loading, or makes it useless."""


def read(directory: Path) -> Contents:
    """Looks at an adapter. Raises AdapterError where there is no config to be read; all else is told as a problem."""
    config = disk.read_config(directory)
    found, ends = _begin(directory, config)
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles and (directory / disk.WEIGHTS).is_file():
        found.problems.append(f"{disk.some(pickles)}: a pickle, which runs code when it is opened; it was not")
    try:
        tensors = tensorfile.header(disk.weights_file(directory))
    except (AdapterError, CheckpointError) as error:
        found.problems.append(str(error))
        return found
    parts = {name: _split(config, ends, name) for name in tensors}
    with Reader() as reader:
        found.groups = [_group(reader, config, found, own) for own in _alike(tensors, parts)]
    found.parameters = sum(group.parameters for group in found.groups)
    found.bytes = sum(group.bytes for group in found.groups)
    found.token_rows = sum(t.shape[0] for name, t in tensors.items() if name.endswith(ROWS))
    found.problems += _missing(config, set(parts.values()))
    found.problems += _other_ranks(config, {parts[name]: tensor.shape for name, tensor in tensors.items()})
    return found


def _begin(directory: Path, config: dict[str, Any]) -> tuple[Contents, tuple[str, ...]]:
    """What the config alone tells, and what tensors of its method are called after their module."""
    kind = config.get("peft_type")
    said = {name: value for name, value in config.items() if name not in APART and value not in hf.SILENT}
    found = Contents(
        path=str(directory),
        format=f"jaxft's own, version {config.get('format')}" if kind == native.PEFT_TYPE else f"peft's {kind}",
        method=None,
        base_model=config.get("base_model_name_or_path"),
        settings=dict(sorted(said.items())),
        modules_to_save=list(config.get("modules_to_save") or []),
    )
    if kind == native.PEFT_TYPE:
        methods = [str(m.get("method") or m.get("module")) for m in config.get("methods") or []]
        classes = {str(leaf.get("class")).partition(":")[2] for leaf in (config.get("leaves") or {}).values()}
        found.method = " + ".join(methods) or ", ".join(sorted(classes))
        return found, ()
    try:
        found.method, form = hf.format_named(directory, config)
        for name, value in hf.unknown_fields(config, form).items():
            found.problems.append(f"{disk.CONFIG}: jaxft does not know {name} = {value!r}, and would refuse to load it")
        hf.refuse_no_numbers(directory, config)
        form.refuse(directory / disk.CONFIG, config)
        return found, form.suffixes if isinstance(form, Format) else ()
    except AdapterError as error:
        found.problems.append(str(error))
        return found, ()


def _split(config: dict[str, Any], ends: tuple[str, ...], name: str) -> tuple[str, str]:
    """The module (or, in our own format, the place) of a tensor, and what it is called after it."""
    places = config.get("leaves") or {}
    if config.get("peft_type") == native.PEFT_TYPE:
        place = max((path for path in places if name.startswith(f"{path}/")), key=len, default="")
        return place, name[len(place) :].lstrip("/")
    name = name.removeprefix(disk.PREFIX)
    end = next((end for end in (*ends, *ENDS) if name.endswith(f".{end}")), name.rpartition(".")[2])
    return name[: -len(end)].rstrip("."), end


def _alike(tensors: dict[str, Tensor], parts: dict[str, tuple[str, str]]) -> list[dict[tuple[str, str], Tensor]]:
    """(module, end) -> tensor of each group of modules that differ by their layer, layers in order."""
    groups: dict[str, dict] = collections.defaultdict(dict)
    for name in sorted(tensors, key=_natural):
        groups[_pattern(parts[name][0])[0]][parts[name]] = tensors[name]
    return list(groups.values())


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _pattern(module: str) -> tuple[str, int | None]:
    """The module with {} for its layer, and the layer."""
    match = re.search(r"(?<=\.)\d+(?=\.)", module)
    return (module, None) if match is None else (f"{module[: match.start()]}{{}}{module[match.end() :]}", int(match[0]))


def _group(reader: Reader, config: dict[str, Any], found: Contents, own: dict[tuple[str, str], Tensor]) -> Group:
    """One group's facts; numbers that are not finite are told as problems."""
    modules = list(dict.fromkeys(module for module, _ in own))
    pattern = _pattern(modules[0])[0]
    layers = [layer for module in modules if (layer := _pattern(module)[1]) is not None]
    group = Group(pattern.replace("{}", f"{{{_ranges(layers)}}}"), len(modules))
    squares: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for module in modules:
        held = {}
        for end, tensor in ((end, t) for (m, end), t in own.items() if m == module):
            size = int(np.prod(tensor.shape))
            group.bytes += tensor.nbytes
            if tensor.dtype not in tensorfile.FLOATS:
                continue  # indices: no parameters
            group.parameters += size
            rows = size // (1, *tensor.shape)[-1] if size else 0
            array = reader.rows(tensor, 0, rows).astype(np.float32) if size else np.zeros(tensor.shape, np.float32)
            bad = int(np.size(array) - np.isfinite(array).sum())
            if bad:
                found.problems.append(f"{module}.{end}: {bad} of {size} numbers are not finite")
            squares[end][0] += float(np.sum(np.square(array, dtype=np.float64)))
            squares[end][1] += size
            held[end] = array
        norm = _update(config, module, held)
        if norm is not None:
            least, most = group.update or (norm, norm)
            group.update = min(least, norm), max(most, norm)
    group.rms = {end: float(np.sqrt(total / max(count, 1))) for end, (total, count) in squares.items()}
    for end in dict.fromkeys(end for _, end in own):
        group.tensors[end] = _sizes([t for (_, other), t in own.items() if other == end])
    if group.update is not None and group.update[1] == 0.0:
        found.problems.append(f"{group.modules}: the update is zero, as before training")
    return group


def _update(config: dict[str, Any], module: str, held: dict[str, np.ndarray]) -> float | None:
    """The Frobenius norm of what LoRA adds to a module's weight."""
    ends = {end.removesuffix(".weight"): array for end, array in held.items()}
    pair = next((pair for pair in PAIRS if pair[0] in ends and pair[1] in ends), None)
    if pair is None or config.get("peft_type") not in ("LORA", "ADALORA") or hf.no_numbers(config):
        return None
    a, b = ends[pair[0]], ends[pair[1]]
    rank = a.shape[0]
    (alpha,) = targets.pattern_values((module,), config.get("alpha_pattern") or {}, config.get("lora_alpha", 8))
    if config["peft_type"] == "ADALORA":
        a, scale = a * ends["lora_E"], alpha / (config.get("init_r", 12) + 1e-5)
    else:
        scale = alpha / max(np.sqrt(rank) if config.get("use_rslora") else rank, 1)
    with np.errstate(all="ignore"):
        return float(scale * np.sqrt(max(np.sum((a @ a.T) * (b.T @ b)), 0.0)))


def _missing(config: dict[str, Any], held: set[tuple[str, str]]) -> list[str]:
    """What is not there though what is there asks for it."""
    modules = sorted({module for module, _ in held}, key=_natural)
    return [*_missing_tensors(modules, held), *_missing_layers(config, modules), *_missing_modules(config, modules)]


def _missing_tensors(modules: list[str], held: set[tuple[str, str]]) -> list[str]:
    """Tensors that other modules of the group have, or that belong to one that is there."""
    ends: dict[str, set[str]] = collections.defaultdict(set)
    for module, end in held:
        ends[_pattern(module)[0]].add(end)
    for one, other in (*PAIRS, *(pair[::-1] for pair in PAIRS)):
        for own in ends.values():
            own |= {other + end.removeprefix(one) for end in own if end.startswith(one) and end != "lora_B.bias"}
    return [
        f"{module}: no {end}"
        for module in modules
        for end in sorted(ends[_pattern(module)[0]])
        if (module, end) not in held
    ]


def _other_ranks(config: dict[str, Any], shapes: dict[tuple[str, str], tuple[int, ...]]) -> list[str]:
    """LoRA's modules whose tensors are of another rank than the config gives them."""
    if config.get("peft_type") != "LORA" or hf.no_numbers(config):
        return []
    others: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
    for (module, end), shape in shapes.items():
        if end.removesuffix(".weight") in ("lora_A", "lora_embedding_A"):
            (rank,) = targets.pattern_values((module,), config.get("rank_pattern") or {}, config.get("r", 8))
            if shape[0] != rank:
                others[int(rank), shape[0]].append(module)
    return [f"r: {said} in {disk.CONFIG}, {held} in {disk.some(modules)}" for (said, held), modules in others.items()]


def _missing_layers(config: dict[str, Any], modules: list[str]) -> list[str]:
    """Layers that the config chooses, or of a group that others have where it does not choose any."""
    chosen = config.get("layers_to_transform")
    if chosen is not None and chosen != []:
        there = {layer for _, layer in map(_pattern, modules)}
        absent = [layer for layer in (chosen if isinstance(chosen, list) else [chosen]) if layer not in there]
        return [f"layers_to_transform: {', '.join(map(str, absent))} has no tensors"] if absent else []
    wanted = config.get("target_modules")
    whole = [re.search(r"\.\d+\.", name) for name in wanted] if isinstance(wanted, list) else [True]
    if any(whole) or config.get("exclude_modules"):
        return []
    layers: dict[str, set[int]] = collections.defaultdict(set)
    for pattern, layer in map(_pattern, modules):
        if layer is not None:
            layers[pattern].add(layer)
    everywhere = set().union(*layers.values())
    gaps = {pattern: everywhere - own for pattern, own in layers.items() if everywhere - own}
    return [f"{p.replace('{}', f'{{{_ranges(list(gap))}}}')}: no tensors, unlike others" for p, gap in gaps.items()]


def _missing_modules(config: dict[str, Any], modules: list[str]) -> list[str]:
    """Targets without a tensor."""
    wanted = config.get("target_modules")
    named = wanted if isinstance(wanted, list) else []
    absent = [name for name in named if not any(module == name or module.endswith(f".{name}") for module in modules)]
    return [f"target_modules: {name} has no tensors" for name in sorted(absent)]


def _sizes(tensors: list[Tensor]) -> str:
    """Dtype and shape, with a range where sizes differ."""
    dtypes = "/".join(dict.fromkeys(t.dtype for t in tensors))
    if len({len(t.shape) for t in tensors}) > 1:
        return f"{dtypes} of different dimensions"
    sizes = [sorted(set(axis)) for axis in zip(*(t.shape for t in tensors), strict=True)]
    return f"{dtypes}[{', '.join(str(n[0]) if len(n) == 1 else f'{n[0]}..{n[-1]}' for n in sizes)}]"


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as 0-2,5."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
