"""An adapter's directory: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written whole.

Nothing here knows a method. Tensors are numpy arrays by their name without peft's prefix ``base_model.model.``, or by
their whole name behind a ``/`` where they do not have it. A directory appears complete, by a rename, or not at all.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors import numpy as safetensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
EVERY = "all tensors of every adapted module"
Tensors = dict[str, np.ndarray]


class AdapterError(ValueError):
    """An adapter that cannot be read or written as asked; nothing has been half-loaded or half-written."""

    def __init__(self, where: object, got: str, expected: str, remedy: str = ""):
        super().__init__(f"{where}: got {got}; expected {expected}. {remedy}".rstrip())


def some(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def read(directory: Path) -> tuple[dict[str, Any], Tensors]:
    """The config and all tensors. Raises AdapterError for anything but a whole safetensors adapter."""
    return read_config(directory), _tensors(weights_file(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """The adapter's config. Raises AdapterError where there is none, or none that can be read."""
    file = directory / CONFIG
    if not file.is_file():
        held = some(sorted(p.name for p in directory.iterdir())) if directory.is_dir() else "no such directory"
        raise AdapterError(directory, f"no {CONFIG} ({held or 'it is empty'})", "a directory written by peft or jaxft")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(file, f"text that is not JSON ({error})", "a JSON object", "Fetch it again.") from None
    if not isinstance(config, dict):
        raise AdapterError(file, f"a JSON {type(config).__name__}", "a JSON object", "Fetch it again.")
    return config


def weights_file(directory: Path) -> Path:
    """The file of the adapter's tensors. Raises AdapterError where there is none, or only a pickle."""
    file = directory / WEIGHTS
    if not file.is_file():
        if (directory / PICKLE).is_file():
            remedy = (
                "A pickle runs code when it is opened. Convert it once, where torch is installed: python -c "
                f"\"import torch; from safetensors.torch import save_file as s; d = '{directory}/'; "
                f"t = torch.load(d + '{PICKLE}', weights_only=True); "
                f"s({{k: v.contiguous() for k, v in t.items()}}, d + '{WEIGHTS}', {{'format': 'pt'}})\""
            )
            raise AdapterError(directory, f"only pickled weights ({PICKLE})", WEIGHTS, remedy)
        raise AdapterError(directory, f"no {WEIGHTS}", "the adapter's weights", "The download is not complete.")
    return file


def _tensors(file: Path) -> Tensors:
    try:
        tensors = safetensors.load_file(file)
    except (SafetensorError, KeyError) as error:
        remedy = "The file is damaged or its download stopped early: fetch it again."
        raise AdapterError(
            file, f"what safetensors cannot read ({error})", "a whole safetensors file", remedy
        ) from None
    for name, array in tensors.items():
        bad = 0 if array.dtype.kind in "biu" else int(np.size(array) - np.isfinite(array).sum())
        if bad:
            got, remedy = (
                f"{bad} of {array.size} numbers that are not finite",
                "Its training diverged, or it is damaged.",
            )
            raise AdapterError(f"{file}: {name}", got, "finite numbers", remedy)
    return {(n.removeprefix(PREFIX) if n.startswith(PREFIX) else f"/{n}"): array for n, array in tensors.items()}


def take(where: object, tensors: Tensors, name: str, shape: tuple[int, ...], expected: str = EVERY) -> np.ndarray:
    """Takes the tensor of that name and shape out of ``tensors``; floating ones come in float32.

    Raises AdapterError; ``expected``: what a whole adapter has."""
    if name not in tensors:
        raise AdapterError(where, f"no tensor {name}", expected, "It was not saved whole.")
    array = tensors.pop(name)
    if array.shape != tuple(shape):
        remedy = "The adapter was made for another model, or its config gives other sizes."
        raise AdapterError(f"{where}: {name}", f"shape {list(array.shape)}", f"{list(shape)}", remedy)
    return array if array.dtype.kind in "biu" else array.astype(np.float32)


def refuse_occupied(target: Path, overwrite: bool) -> None:
    """Raises AdapterError if ``target`` holds something that may not, or should not, be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise AdapterError(target, "a file", "a directory that does not exist yet", "Choose another path.")
    if not overwrite:
        remedy = "Choose another path (or, from Python, overwrite=True to replace it)."
        raise AdapterError(target, "a directory that is not empty", "a new or empty one", remedy)
    if not (target / CONFIG).is_file():
        remedy = f"It is not deleted, as it does not look like an adapter (no {CONFIG}): choose another path."
        raise AdapterError(target, "a directory that is not empty", "an earlier adapter to overwrite", remedy)


def write(target: Path, config: dict[str, Any], tensors: Tensors, readme: str) -> None:
    """Writes the directory beside ``target`` and renames it there; whatever was there is removed last."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        arrays = {whole_name(name): np.asarray(array, order="C") for name, array in sorted(tensors.items())}
        safetensors.save_file(arrays, work / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (work / CONFIG).write_text(text + "\n", encoding="utf-8")
        (work / "README.md").write_text(readme, encoding="utf-8")
        work.chmod(0o755)
        for path in (*work.iterdir(), work):
            _sync(path)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old)
            os.replace(work, target)
            shutil.rmtree(old)
        else:
            os.replace(work, target)
        _sync(target.parent)
    finally:
        if work.exists():
            shutil.rmtree(work)


def whole_name(name: str) -> str:
    """A tensor's name in the file."""
    return name[1:] if name.startswith("/") else PREFIX + name


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def host(array: Any) -> np.ndarray:
    """The array in this host's memory, gathered from all processes if it lies on several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
