"""The words of the questions: which of two replies is better, how good one is, what is wrong with it, a better one.

What is quoted stands between marks that depend on all of it, so that no reply can close its own quotation.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.rewards.feedback import constitution
from jaxft.rewards.feedback.asking import Question
from jaxft.rewards.feedback.constitution import Principle

LETTERS = ("A", "B")
SCALE = tuple(str(i) for i in range(1, 11))
"""The numbers of a rating."""


def compare(prompt: Any, first: str, second: str, by: Principle, order: str) -> Question:
    """Which of two replies is better. ``order`` is noted: which of the pair stands first."""
    parts = {"Conversation": transcript(prompt), "Reply A": first, "Reply B": second}
    asks = f"{by.comparison} Answer with the letter alone: A or B."
    return _asked(parts, asks, LETTERS, {"asks": "compare", "principle": by.name, "order": order})


def rate(prompt: Any, reply: str, by: Principle) -> Question:
    """How good a reply is."""
    asks = f"{by.rating} Answer with a number alone, from 1 (not at all) to 10 (as well as can be)."
    parts = {"Conversation": transcript(prompt), "Reply": reply}
    return _asked(parts, asks, SCALE, {"asks": "rate", "principle": by.name})


def critique(prompt: Any, reply: str, by: Principle, seed: int) -> Question:
    """What is wrong with a reply."""
    parts = {"Conversation": transcript(prompt), "Reply": reply}
    return _asked(parts, by.critique, (), {"asks": "critique", "principle": by.name}, seed)


def revise(prompt: Any, reply: str, criticised: str, by: Principle, seed: int) -> Question:
    """A better reply."""
    parts = {"Conversation": transcript(prompt), "Reply": reply, "Critique of the reply": criticised}
    asks = f"{by.revision} Write the new reply alone, with nothing before or after it."
    return _asked(parts, asks, (), {"asks": "revise", "principle": by.name}, seed)


def _asked(
    parts: Mapping[str, str], asks: str, labels: tuple[str, ...], about: Mapping[str, Any], seed: int = 0
) -> Question:
    mark = constitution.digest(dict(parts)).hex()[:6]
    quoted = [f"[{name} {mark}]\n{text.strip()}\n[End of {name} {mark}]" for name, text in parts.items()]
    return Question(({"role": "user", "content": "\n\n".join([*quoted, asks])},), labels, seed, about)


def transcript(prompt: Any) -> str:
    """A prompt to read: text as it is, messages with who says them."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {_content(turn)}" for turn in prompt)


def _content(turn: Mapping[str, Any]) -> str:
    said = turn.get("content")
    return said if isinstance(said, str) else "" if said is None else str(said)


def parsed(text: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives in words: all of it, what follows "answer" or stands in [[ ]] last, or the only
    one in it; None where that is not clear."""
    text = re.sub(r"\s*(?:/|out of)\s*10\b", "", text) if "10" in labels else text
    either = "|".join(sorted(map(re.escape, labels), key=len, reverse=True))
    alone = rf"(?<![\w.])({either})(?![\w'\u2019]|\.\d)"
    if whole := re.fullmatch(rf"\W*({either})\W*", text):
        return whole[1]
    for pattern in (rf"\[\[\s*({either})\s*\]\]", rf"(?i:answer|verdict|rating|better)\b\W*(?i:is\b)?\W*{alone}"):
        if found := re.findall(pattern, text):
            return found[-1]
    found = {*re.findall(alone, text)}
    return found.pop() if len(found) == 1 else None
