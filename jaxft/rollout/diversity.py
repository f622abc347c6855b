r"""How varied completions are: a policy that has found what a reward likes says it again and again.

.. math:: \text{distinct}_n = \frac{|\text{different } n\text{-grams}|}{|\text{tokens}|}, \qquad
          \text{self-BLEU} = \overline{\mathrm{BLEU}_4(\text{one}, \text{all others as references})}

Li et al. 2016, section 6 (arXiv:1510.03055); Zhu et al. 2018, section 3 (arXiv:1802.01886), of BLEU with 0.1 in the
place of no match (Chen and Cherry 2014, method 1). Of tokens, as all languages and code have them; over all completions
together, whatever their prompts.
"""

import math
from collections import Counter
from collections.abc import Sequence

ORDERS = (1, 2, 3, 4)
NO_MATCH = 0.1


def metrics(completions: Sequence[Sequence[int]]) -> dict[str, float]:
    """``completions/distinct_1`` and ``_2``, and of two or more ``completions/self_bleu``. The completions are token
    ids without what ended them; empty ones count nowhere."""
    said = [tuple(ids) for ids in completions if len(ids)]
    if not said:
        return {}
    found = {f"completions/distinct_{n}": distinct(said, n) for n in (1, 2)}
    return found | ({"completions/self_bleu": self_bleu(said)} if len(said) > 1 else {})


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over the number of tokens."""
    different = {gram for ids in completions for gram in _grams(ids, n)}
    return len(different) / sum(map(len, completions))


def self_bleu(completions: Sequence[Sequence[int]]) -> float:
    """The mean BLEU of each completion against all others. In time linear in their length: a match is cut at the most
    that any other has of it, which is the most of all, or the second most for the one that has that."""
    logs = [0.0] * len(completions)
    lengths = Counter(map(len, completions))
    for n in ORDERS:
        every = [Counter(_grams(ids, n)) for ids in completions]
        most: dict[tuple[int, ...], tuple[int, int]] = {}
        for counts in every:
            for gram, count in counts.items():
                first, second = most.get(gram, (0, 0))
                most[gram] = (count, first) if count > first else (first, max(second, count))
        for i, (ids, counts) in enumerate(zip(completions, every, strict=True)):
            matches = 0
            for gram, count in counts.items():
                first, second = most[gram]
                matches += min(count, second if count == first else first)
            if n == 1 and not matches:
                logs[i] = -math.inf
            logs[i] += math.log((matches or NO_MATCH) / max(len(ids) - n + 1, 1)) / len(ORDERS)
    total = 0.0
    for ids, log in zip(completions, logs, strict=True):
        own = len(ids)
        others = (length for length, count in lengths.items() if count > (length == own))
        nearest = min(others, key=lambda length: (abs(length - own), length))
        total += math.exp(log + min(0.0, 1.0 - nearest / own))
    return total / len(completions)


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
