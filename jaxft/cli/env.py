"""`jaxft env`: versions, devices, memory, and what this machine can run. Paste it into a bug report."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import jaxft
from jaxft.models import attention_choice
from jaxft.models.attention_choice import Case

_PACKAGES = (
    "jax",
    "jaxlib",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
    "datasets",
    "grain",
    "flax",
)


_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w-]+)\])?[^;]*(?:;.*extra == ['\"]([\w-]+)['\"].*)?$")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def command(args: argparse.Namespace) -> int:
    """Prints the facts."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    console = Console(highlight=False, markup=False)
    for title, rows in facts.items():
        table = Table(
            title=title, title_style="bold", title_justify="left", box=None, show_header=False, pad_edge=False
        )
        for name, value in rows.items():
            table.add_row(name, str(value))
        console.print(table, "", sep="\n")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Facts by topic."""
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "what runs here": runs(),
        "extras": extras(),
    }


def versions() -> dict[str, str]:
    """jaxft, Python and the packages that decide behaviour."""
    found = {"jaxft": jaxft.__version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in _PACKAGES}


def machine() -> dict[str, str]:
    """The host."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "memory": gibibytes(pages),
    }


def devices() -> dict[str, str]:
    """The accelerators jax sees, their memory, and what runs on them."""
    every = jax.devices()
    facts = {"backend": jax.default_backend(), "processes": str(jax.process_count()), "devices": str(len(every))}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        limit = f", {gibibytes(stats['bytes_limit'])}" if "bytes_limit" in stats else ""
        facts[f"device {device.id}"] = f"{device.device_kind}{limit}"
    return facts


def runs() -> dict[str, str]:
    """What the first device runs: number formats, and the attention kernel that training would choose in each."""
    device = jax.local_devices()[0]
    capability = compute_capability(device)
    case = Case(
        device.platform, "", batch=1, queries=2048, keys=2048, heads=32, kv_heads=8, head_dim=128, segments=True
    )
    case = dataclasses.replace(case, capability=capability)
    facts = {}
    for dtype in ("bfloat16", "float16", "float32"):
        choice = attention_choice.choose(dataclasses.replace(case, dtype=dtype))
        facts[dtype] = f"attention by {choice.backend}: {choice.reason}"
    if device.platform == "cpu":
        facts["bfloat16"] += "; a CPU emulates it, slowly: train in float32"
    if capability and capability < (8, 0):
        facts["bfloat16"] += f"; compute capability {capability[0]}.{capability[1]} has no bfloat16 units"
    return facts


def compute_capability(device: Any) -> tuple[int, int] | None:
    """CUDA compute capability; None where there is none."""
    if device.platform != "gpu":
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", str(device.compute_capability))
    return (int(found[1]), int(found[2])) if found else None


def extras() -> dict[str, str]:
    """Which of jaxft's optional dependencies are installed."""
    every = importlib.metadata.metadata("jaxft").get_all("Provides-Extra") or []
    return {extra: _state(requirements("jaxft", extra)) for extra in every if extra not in ("test", "parity")}


def requirements(package: str, extra: str) -> list[str]:
    """The packages that an extra adds, those of its own extras (`jax[tpu]`) included."""
    if not _has(package):
        return [package]
    found = []
    for requirement in importlib.metadata.requires(package) or ():
        name, inner, wanted = _REQUIREMENT.match(requirement).groups()  # type: ignore[union-attr]
        if wanted == extra:
            found += requirements(name, inner) if inner else [name]
    return found


def _state(packages: list[str]) -> str:
    missing = [package for package in packages if not _has(package)]
    return "installed" if not missing else f"missing {', '.join(missing)}"


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def gibibytes(n: int) -> str:
    """Bytes for people."""
    return f"{n / 2**30:.1f} GiB"
