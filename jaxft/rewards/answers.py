"""Where the answer of a completion stands, and how answers are written the same.

Where a completion reasons, `<think>...</think>` stands before its final answer, which alone is judged.
"""

import re
import unicodedata

TAGS = ("<think>", "</think>")


def parts(text: str, tags: tuple[str, str] = TAGS) -> tuple[str, str | None]:
    """The reasoning of a completion ("" if none) and its final answer; None if the reasoning never ends.

    A template may have written the first tag at the end of the prompt: then the second alone is there."""
    first, last = tags
    before, closed, after = text.rpartition(last)
    if closed:
        return before.strip().removeprefix(first).strip(), after.strip()
    return ("", text.strip()) if first not in text else (text.partition(first)[2].strip(), None)


def normalised(text: str) -> str:
    """A text without what says nothing: case, white space, quotes, a full stop at the end, commas between digits."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return text.strip("\"'`\u201c\u201d\u2018\u2019 ").removesuffix(".").strip("\"'` ")


def boxed(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}`` (or ``\fbox{...}``) whose braces close; None if there is none."""
    for found in reversed([*re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for at in range(found.end(), len(text)):
            escaped = text[at - 1] == "\\" and text[at - 2 : at] != "\\\\"
            depth += 0 if escaped else (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[found.end() : at].strip()
    return None


NUMBER = (
    r"[-+]?\s*\$?\s*(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?\s*(?:\\?%)?"
)


def last_number(text: str) -> str | None:
    """The last number of a text with its sign, a fraction's denominator and a percent sign; None if there is none."""
    found = [*re.finditer(rf"(?<![\w.]){NUMBER}", text)]
    return found[-1].group().strip() if found else None


def last_match(pattern: str, text: str) -> str | None:
    """The last match of a regex, its first group if it has one; None if it is not found."""
    found = re.findall(pattern, text, re.DOTALL)
    return None if not found else found[-1] if isinstance(found[-1], str) else found[-1][0]
