r"""Mathematical answers compared without a computer algebra system: as numbers, lists of them, or as they are written.

Numbers are exact fractions, read from digits with commas, decimals, powers of ten, `a/b`, ``\frac{a}{b}``, mixed
numbers, percentages, and with units after them.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from jaxft.rewards import answers

LONGEST = 400
"""Characters of a number that is read as one, and the largest power of ten: a hostile 1e999999999 costs no time."""

_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|big|Big|bigg|Bigg)(?![a-zA-Z])|\\[,;:! ]|\\q?quad(?![a-zA-Z])|~"
    r"|\^\s*\{?\\circ\}?|\\degree|°|\\?\$|\\\(|\\\)|\\\[|\\\]"
)
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_DIGITS = r"\d+(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"([-+]?)\s*(?:(\d+)\s+)?({_DIGITS})(?:e([-+]?\d{{1,4}}))?(?:\s*/\s*([-+]?\d+))?(%?)")
_POWER = re.compile(r"\s*(?:\\times|\\cdot|\u00d7|\*)\s*10\s*\^\s*\{?\s*([-+]?\d{1,4})\s*\}?")
_RAISED = str.maketrans({c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"\u2212": "-", "\u2044": "/"})
_UNIT = re.compile(
    r"(?:\s+[a-zµ]{2,}[a-zµ ]*|\s+[mgshl]|\s*(?:[mckµ]?m|[mk]?g|m?s|h|hrs?|min|m?l|in|ft|usd|eur|k?hz|k?w|v))"
)
_COUNTS = (
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "dozen",
    "pi",
    "or",
    "and",
    "to",
    "sqrt",
    "infinity",
)
_NAMED = re.compile(r"^[a-z]\w?(?:\([a-z]\))?\s*=\s*(?=.)")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def plain(answer: str) -> str:
    """An answer without the marks that only lay it out; fractions as ``(a)/(b)``, or a/b where both are digits."""
    text = answers.normalised(_DROPPED.sub("", answer.translate(_RAISED)))
    text = re.sub(r"\s*(?:\\%|\bpercent\b)", "%", _WORDS.sub(r" \1 ", text))
    while (found := _FRACTION.sub(_slash, text)) != text:
        text = found
    text = text.replace("\\{", "{").replace("\\}", "}").strip().removesuffix(".").strip()
    return _NAMED.sub("", text)


def _slash(found: re.Match[str]) -> str:
    above, below = (found[1] or found[2] or "").strip(), (found[3] or found[4] or "").strip()
    digits = above.lstrip("-").isdigit() and below.isdigit()
    return f" {above}/{below}" if digits else f" ({above})/({below})"


class Number(NamedTuple):
    """A number and what it is of."""

    value: Fraction
    percent: bool
    """Whether a percent sign follows; the value is as written before it."""
    unit: str
    """Empty if none."""


def number(answer: str) -> Number | None:
    """The number that an answer is; None where it is none."""
    text = plain(answer)
    if len(text) > LONGEST:
        return None
    text = _POWER.sub(r"e\1", text)
    found = _NUMBER.match(text)
    unit = "" if found is None else text[found.end() :].rstrip()
    if found is None or not _is_unit(unit):
        return None
    sign, whole, digits, power, below, percent = found.groups()
    if whole and (not below or "." in digits):
        return None  # "3 4" is no number, "3 1/4" is
    if (power and abs(int(power)) > LONGEST) or (below and int(below) == 0):
        return None
    value = Fraction(digits.rstrip(".")) * Fraction(10) ** int(power or 0) / int(below or 1) + int(whole or 0)
    return Number(-value if sign == "-" else value, bool(percent), unit.strip().removesuffix("s"))


def _is_unit(rest: str) -> bool:
    """Whether what stands after a number is of what it is, rather than a factor or a list that goes on."""
    without_power = re.sub(r"(?:\s*/\s*[a-zµ]+)?(?:\^\{?-?\d\}?)?$", "", rest)
    words = rest.split()
    return not rest or (_UNIT.fullmatch(without_power) is not None and not {*words} & {*_COUNTS})


def same(said: str, right: str, tolerance: float) -> bool:
    """Whether two answers are equal: as numbers to within a relative ``tolerance``, item by item where both are lists
    in the same brackets (braces hold sets), or as written but for layout. A percentage equals its number and its
    share of one."""
    a, b = plain(said), plain(right)
    if not a or not b:
        return False
    if re.sub(r"\s", "", a) == re.sub(r"\s", "", b):
        return True
    x, y = number(a), number(b)
    if x is not None and y is not None:
        if x.unit and y.unit and x.unit != y.unit:
            return False
        return any(abs(u - v) <= Fraction(tolerance) * abs(v) for u in _readings(x, y) for v in _readings(y, x))
    ours, theirs = _items(a), _items(b)
    if ours is None or theirs is None or len(ours) != len(theirs) or (a[0], a[-1]) != (b[0], b[-1]):
        return False
    if a[0] != "{":
        return all(same(i, j, tolerance) for i, j in zip(ours, theirs, strict=True))
    left = list(theirs)
    for item in ours:
        match = next((other for other in left if same(item, other, tolerance)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _readings(number: Number, beside: Number) -> list[Fraction]:
    """Of a percentage beside a number that is none: as written, and its share of one."""
    return [number.value, number.value / 100] if number.percent and not beside.percent else [number.value]


def _items(text: str) -> list[str] | None:
    """The items of a bracketed list of two or more; None for what is none."""
    if len(text) < 3 or text[0] not in _PAIRS or text[-1] not in ")]}":
        return None
    depth, items, begin = 0, [], 1
    for at, char in enumerate(text[1:-1], 1):
        depth += (char in "([{") - (char in ")]}")
        if char in ",;" and depth == 0:
            items.append(text[begin:at].strip())
            begin = at + 1
    return [*items, text[begin:-1].strip()] if items and depth == 0 and all(items) else None
