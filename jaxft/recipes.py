"""The shipped configs: where they are, and what the comments at their top say.

A recipe is a YAML file of `configs/`. Its header is a line of what it does, then `# command:`, `# hardware:`, `# time:`
and `# score:` lines. In a checkout they lie beside the package, in an installed wheel inside it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from jaxft.border.errors import ConfigError

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """One shipped config and its header."""

    name: str
    path: Path
    title: str
    facts: dict[str, str]
    """What the header says after `command:`, `hardware:`, `time:`, `score:`."""


def folder() -> Path:
    """Where the shipped configs are."""
    beside = _HERE.parent / "configs"
    return beside if (_HERE.parent / "pyproject.toml").exists() and beside.is_dir() else _HERE / "configs"


def every() -> list[Recipe]:
    """The shipped configs, by name."""
    return [_recipe(path) for path in sorted(folder().rglob("*.yaml"))]


def find(name: str) -> Path:
    """The config file a user means: a file, or a shipped recipe by name (`sft_lora`, `configs/sft_lora.yaml`)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {recipe.name: recipe.path for recipe in every()}
    wanted = path.with_suffix("").as_posix().removeprefix("configs/")
    if wanted in shipped and path.suffix in ("", ".yaml"):
        return shipped[wanted]
    raise ConfigError(
        f"no config file {name!r} here, and no shipped recipe of that name; those are {', '.join(shipped)}"
    )


def _recipe(path: Path) -> Recipe:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    facts, last = dict[str, str](), ""
    for line in lines[1:]:
        if found := re.match(r"(command|hardware|time|score): *(.*)", line, re.IGNORECASE):
            last = found[1].lower()
            facts[last] = found[2]
        elif not line:
            last = ""
        elif last:
            facts[last] += f" {line}"
    name = path.relative_to(folder()).with_suffix("").as_posix()
    return Recipe(name, path, lines[0] if lines else "", facts)
