"""A constitution: principles written down in a YAML file, of which each prompt draws some.

principles:
  - name: honest
    weight: 1.5                    # chance of being drawn, relative to the others; default: 1
    critique: Say which claims of the reply are untrue.
    revision: Rewrite the reply so that every claim in it is true.
    comparison: Which of the two replies is more truthful?
    rating: How truthful is the reply?          # needed where single replies are rated
"""

import difflib
import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from jaxft.border.errors import ConfigError

DEFAULT = Path(__file__).with_name("constitution.yaml")


@dataclass(frozen=True)
class Principle:
    """One thing that replies are judged by."""

    name: str
    critique: str
    """Asks what is wrong with a reply."""
    revision: str
    """Asks for a better one."""
    comparison: str
    """Asks which of two is better."""
    rating: str = ""
    """Asks how good one is; empty: that cannot be asked."""
    weight: float = 1.0


@dataclass(frozen=True)
class Constitution:
    """Principles that replies are judged by."""

    principles: tuple[Principle, ...]
    path: str

    def chosen(self, prompt: Any, seed: int, count: int) -> tuple[Principle, ...]:
        """As many different principles for a prompt, drawn by their weights; always the same ones for the same seed.

        Efraimidis and Spirakis 2006: without replacement, the smallest of :math:`-\\ln(u_i) / w_i`."""
        draws = random.Random(int.from_bytes(digest([seed, prompt]), "little"))
        keys = [-math.log(1.0 - draws.random()) / one.weight for one in self.principles]
        order = sorted(range(len(keys)), key=lambda i: keys[i])
        return tuple(self.principles[i] for i in order[:count])


def digest(value: Any) -> bytes:
    """What tells a value of JSON from others: 16 bytes."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read(path: str | None = None, *, rated: bool = False, least: int = 1) -> Constitution:
    """The constitution of a file; the one that ships by default. Raises ConfigError with every problem found.

    ``rated``: whether single replies are to be rated by it; ``least``: principles that it must have."""
    file = DEFAULT if path is None else Path(path).expanduser()
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: a constitution cannot be read there ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no YAML: {error}") from None
    listed = found.get("principles") if isinstance(found, dict) and set(found) == {"principles"} else None
    if not isinstance(listed, list) or not listed:
        got = ", ".join(map(str, found)) or "nothing" if isinstance(found, dict) else type(found).__name__
        raise ConfigError(f"{file}: got {got}; expected the key `principles` alone, with a list of at least one")
    problems, made = list[str](), list[Principle]()
    for number, item in enumerate(listed):
        wrong = _problems(item, rated)
        problems += [f"{file}: principles.{number}{problem}" for problem in wrong]
        if not wrong:
            made.append(Principle(**{key: value if key == "weight" else value.strip() for key, value in item.items()}))
    names = [one.name for one in made]
    problems += [f"{file}: the name {name!r} is there twice; give each another" for name in _twice(names)]
    if not problems and len(made) < least:
        problems = [f"{file}: got {len(made)} principles; `principles: {least}` for each prompt needs at least {least}"]
    if problems:
        raise ConfigError("\n".join(problems))
    return Constitution(tuple(made), str(file))


def _problems(item: Any, rated: bool) -> list[str]:
    """What is wrong with an entry of the list, each with its key."""
    known = [field.name for field in fields(Principle)]
    if not isinstance(item, dict):
        return [f": got {item!r}; expected a mapping with {', '.join(known)}"]
    found = []
    for key in item:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            meant = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
            found.append(f".{key}: no such key; {meant}")
    for key in (name for name in known if name != "weight"):
        needed = key != "rating" or rated
        if key in item and (not isinstance(item[key], str) or not item[key].strip()):
            found.append(f".{key}: got {item[key]!r}; expected text")
        elif key not in item and needed:
            why = ", for single replies are rated (method: pointwise)" if key == "rating" else ""
            found.append(f".{key}: must be given{why}")
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        found.append(f".weight: got {weight!r}; expected a number above 0")
    return found


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]
