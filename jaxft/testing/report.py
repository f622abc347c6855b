"""Saying what does not hold: each cause once, in a few lines, however much it breaks in however many places."""

import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = str(Path(__file__).resolve().parent.parent)
FOUND, TOLD = 240, 5
"""Characters of what was found, and causes told in full."""
WORDS = {
    "TypePromotionError": "dtypes are mixed, as where a float32 field meets a bfloat16 x or base: cast each field "
    "where it is used, self.a.astype(x.dtype)"
}
"""What to say instead of JAX's own message."""


@dataclass(frozen=True)
class Failure:
    """A property that does not hold."""

    property: str
    """In words."""
    where: str
    """On what: a stack of matrices, a whole model, ..."""
    found: str
    """What was found instead."""
    cause: str
    """The same for failures that are to be told as one."""


def told(error: Exception) -> str:
    """An exception in one line, with the line of the method's own code that it comes from."""
    name = type(error).__name__
    words = WORDS.get(name) or f"{name}: {(str(error).strip() or '(no message)').splitlines()[0]}"
    return textwrap.shorten(words, FOUND, placeholder=" ...") + place(error)


def place(error: Exception) -> str:
    """Where in code from outside jaxft and its libraries an exception was raised, in brackets; empty if in none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((PACKAGE, "<")) and "site-packages" not in f.filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


def summary(name: str, failures: Sequence[Failure]) -> str:
    """The whole report on a method."""
    causes = dict[str, list[Failure]]()
    for failure in failures:
        causes.setdefault(failure.cause, []).append(failure)
    entries = [_entry(group) for group in causes.values()]
    more = [f"- and {len(entries) - TOLD} more; mend these first"] if len(entries) > TOLD else []
    count = len({failure.property for failure in failures})
    head = f"{name} breaks {count} {'property' if count == 1 else 'properties'}:"
    return "\n".join([head, *entries[:TOLD], *more])


def _entry(group: Sequence[Failure]) -> str:
    """What one cause breaks, and what was found in the first place where it does."""
    first = group[0]
    others = list(dict.fromkeys(failure.property for failure in group[1:]))
    others = [words for words in others if words != first.property]
    places = [where for where in dict.fromkeys(failure.where for failure in group) if where != first.where]
    also = f"\n  also: {'; '.join(places)}" if places else ""
    if others:
        some = f" and {len(others) - 2} more" if len(others) > 2 else ""
        also += f"\n  so too: {' '.join(others[:2])}{some}"
    return f"- {first.property}\n  {first.where}: {first.found}{also}"
