"""What follows from answers: which of two replies is better, asked in both orders, and how good a reply is.

A judge tends to prefer the reply that it reads first (or second). Asked in both orders and averaged, that cancels: one
that always says A is undecided, at a confidence of 1/2.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxft.rewards.feedback import asking, questions
from jaxft.rewards.feedback.asking import Answer, Failure, Judge, Ledger
from jaxft.rewards.feedback.constitution import Principle

ORDERS = ("as given", "swapped")


class Pair(NamedTuple):
    """Two replies to one prompt, and what they are compared by."""

    prompt: Any
    first: str
    second: str
    principles: tuple[Principle, ...]


class Comparison(NamedTuple):
    """Which of two replies is better."""

    first: float | None
    """The probability that the first one is: the mean over orders and principles. None: there was no answer."""
    orders: tuple[tuple[float, float], ...] = ()
    """Of each principle, that probability as given and swapped."""
    problem: str = ""
    """Why there is no answer."""

    @property
    def confidence(self) -> float:
        """The probability of the better one."""
        return math.nan if self.first is None else max(self.first, 1.0 - self.first)

    @property
    def swayed(self) -> int:
        """Principles by which the order decided: each order preferred another reply."""
        return sum((given - 0.5) * (swapped - 0.5) < 0 for given, swapped in self.orders)

    @property
    def leaning(self) -> float:
        """By how much the reply that is read first is preferred beyond what both orders agree on: from -1/2 to 1/2."""
        return math.fsum(given - swapped for given, swapped in self.orders) / (2 * max(len(self.orders), 1))


def compare(ledger: Ledger, judge: Judge, pairs: Sequence[Pair]) -> list[Comparison]:
    """Compares pairs in both orders. Replies that are the same are not asked about. Raises what the judge raises."""
    asked = [
        questions.compare(p.prompt, *texts, by=by, order=order)
        for p in pairs
        if p.first.strip() != p.second.strip()
        for by in p.principles
        for order, texts in zip(ORDERS, ((p.first, p.second), (p.second, p.first)), strict=True)
    ]
    answers = iter(ledger.ask(judge, asked))
    return [
        Comparison(0.5, ((0.5, 0.5),) * len(p.principles))
        if p.first.strip() == p.second.strip()
        else _comparison([next(answers) for _ in p.principles for _ in ORDERS])
        for p in pairs
    ]


def _comparison(answers: Sequence[Answer | Failure]) -> Comparison:
    found = []
    for number, answer in enumerate(answers):
        shares = _shares(answer, questions.LETTERS)
        if isinstance(shares, str):
            return Comparison(None, problem=shares)
        found.append(shares[questions.LETTERS[number % 2]])  # swapped, the first of the pair is B
    orders = tuple(zip(found[::2], found[1::2], strict=True))
    return Comparison(math.fsum(found) / len(found), orders)


class Rating(NamedTuple):
    """How good a reply is."""

    score: float | None
    """The expected number, from 1 to 10; None: there was no answer."""
    shares: tuple[float, ...] = ()
    """The probability of each number."""
    problem: str = ""


def rate(ledger: Ledger, judge: Judge, replies: Sequence[tuple[Any, str, tuple[Principle, ...]]]) -> list[Rating]:
    """Rates (prompt, reply, principles): the expectation over the label probabilities, their mean over principles
    (Liu et al. 2023, G-Eval, eq. 1, arXiv:2303.16634). Raises what the judge raises."""
    asked = [questions.rate(prompt, reply, by) for prompt, reply, principles in replies for by in principles]
    answers = iter(ledger.ask(judge, asked))
    return [_rating([next(answers) for _ in principles]) for _, _, principles in replies]


def _rating(answers: Sequence[Answer | Failure]) -> Rating:
    found = []
    for answer in answers:
        shares = _shares(answer, questions.SCALE)
        if isinstance(shares, str):
            return Rating(None, problem=shares)
        found.append(tuple(shares[label] for label in questions.SCALE))
    mean = tuple(math.fsum(column) / len(found) for column in zip(*found, strict=True))
    return Rating(math.fsum(share * int(label) for share, label in zip(mean, questions.SCALE, strict=True)), mean)


def better(one: Rating, other: Rating) -> float | None:
    """The probability that a draw from one rating is above a draw from another; half of that for equal ones."""
    if one.score is None or other.score is None:
        return None
    above = math.fsum(p * (math.fsum(other.shares[:i]) + other.shares[i] / 2) for i, p in enumerate(one.shares))
    return min(max(above, 0.0), 1.0)


def _shares(answer: Answer | Failure, labels: Sequence[str]) -> dict[str, float] | str:
    """The probability of each label, or why there is none."""
    if isinstance(answer, Failure):
        return str(answer)
    said = questions.parsed(answer.text, labels) if answer.logp is None else None
    shares = asking.shares(answer, labels, said)
    return (
        f"the judge's answer is none of {labels[0]} to {labels[-1]}: {answer.text[:80]!r}" if shares is None else shares
    )
