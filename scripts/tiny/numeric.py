"""Tasks on numbers: sums, differences, products, order, sequences."""

import random

from scripts.tiny.task import Fields, Task


def _number(rng: random.Random) -> int:
    """A number below 100, one digit a third of the time."""
    return rng.randint(1, 9) if rng.random() < 0.33 else rng.randint(10, 99)


def _list(rng: random.Random, shortest: int, longest: int) -> str:
    return " ".join(str(n) for n in rng.sample(range(1, 100), rng.randint(shortest, longest)))


def _ints(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def _pair(rng: random.Random) -> dict[str, str]:
    return {"a": str(_number(rng)), "b": str(_number(rng))}


def _ordered_pair(rng: random.Random) -> dict[str, str]:
    low, high = sorted((_number(rng), _number(rng)))
    return {"a": str(high), "b": str(low)}


def _factors(rng: random.Random) -> dict[str, str]:
    return {"a": str(rng.randint(2, 99)), "b": str(rng.randint(2, 9))}


def _run(rng: random.Random) -> dict[str, str]:
    start, step = rng.randint(1, 60), rng.choice((-5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 10))
    length = rng.randint(3, 4)
    start += 5 * length * (step < 0)
    return {"items": " ".join(str(start + step * i) for i in range(length))}


def _numbers(rng: random.Random) -> dict[str, str]:
    return {"items": _list(rng, 3, 4)}


def _few_or_many(rng: random.Random) -> dict[str, str]:
    return {"items": _list(rng, 3, 6)}


def _next(fields: Fields) -> str:
    items = _ints(fields["items"])
    return str(2 * items[-1] - items[-2])


def _evens(fields: Fields) -> str:
    return " ".join(str(n) for n in _ints(fields["items"]) if n % 2 == 0) or "none"


def _compare(fields: Fields) -> str:
    a, b = int(fields["a"]), int(fields["b"])
    return "less" if a < b else "more" if a > b else "equal"


NUMBER_TASKS = (
    Task(
        "add",
        _pair,
        lambda f: str(int(f["a"]) + int(f["b"])),
        ("{a} + {b} = {answer}", "{a} and {b} make {answer}", "Add {a} and {b}: {answer}", "{a} plus {b}: {answer}"),
        ("What is {a} plus {b}?", "Work out the sum of {a} and {b}.", "How much is {a} + {b}?"),
    ),
    Task(
        "subtract",
        _ordered_pair,
        lambda f: str(int(f["a"]) - int(f["b"])),
        (
            "{a} - {b} = {answer}",
            "{a} less {b} is {answer}",
            "{a} take away {b}: {answer}",
            "From {a} take {b}: {answer}",
        ),
        ("What is {a} minus {b}?", "Subtract {b} from {a}.", "How much is {a} - {b}?"),
    ),
    Task(
        "multiply",
        _factors,
        lambda f: str(int(f["a"]) * int(f["b"])),
        ("{a} x {b} = {answer}", "{a} times {b} is {answer}", "{b} rows of {a} make {answer}"),
        ("What is {a} multiplied by {b}?", "Work out the product of {a} and {b}.", "How much is {a} x {b}?"),
    ),
    Task(
        "sort_numbers",
        _numbers,
        lambda f: " ".join(str(n) for n in sorted(_ints(f["items"]))),
        (
            "Sort: {items} -> {answer}",
            "{items} in order: {answer}",
            "From small to big: {items} gives {answer}",
            "Put in order {items}. Answer: {answer}",
            "Numbers: {items}\nSorted: {answer}",
            "{items}\nsorted\n{answer}",
        ),
        (
            "Please sort these numbers: {items}",
            "Can you put {items} in rising order?",
            "Order these from smallest to largest: {items}",
        ),
    ),
    Task(
        "largest",
        _few_or_many,
        lambda f: str(max(_ints(f["items"]))),
        (
            "Largest of {items}: {answer}",
            "{items}. The biggest is {answer}",
            "Biggest in {items} -> {answer}",
            "Numbers: {items}\nLargest: {answer}",
            "{items}\nlargest\n{answer}",
        ),
        (
            "Which is the largest of these numbers: {items}?",
            "Find the biggest number in this list: {items}",
            "What is the largest number among {items}?",
        ),
    ),
    Task(
        "smallest",
        _few_or_many,
        lambda f: str(min(_ints(f["items"]))),
        (
            "Smallest of {items}: {answer}",
            "{items}. The smallest is {answer}",
            "Smallest in {items} -> {answer}",
            "Numbers: {items}\nSmallest: {answer}",
            "{items}\nsmallest\n{answer}",
        ),
        (
            "Which is the smallest of these numbers: {items}?",
            "Find the smallest number in this list: {items}",
            "What is the smallest number among {items}?",
        ),
    ),
    Task(
        "compare",
        _pair,
        _compare,
        ("{a} against {b}: {answer}", "{a} beside {b} is {answer}", "Compare {a} to {b} -> {answer}"),
        (
            "Is {a} more than, less than or equal to {b}? Say more, less or equal.",
            "Compare {a} with {b}: more, less or equal?",
        ),
    ),
    Task(
        "sequence",
        _run,
        _next,
        (
            "{items} ... {answer}",
            "After {items} comes {answer}",
            "Go on: {items} -> {answer}",
            "Next: {items}, {answer}",
        ),
        ("Which number comes next: {items}?", "Continue the sequence with one number: {items}"),
    ),
    Task(
        "evens",
        _few_or_many,
        _evens,
        ("Even numbers in {items}: {answer}", "Keep the even ones: {items} -> {answer}", "{items}\neven\n{answer}"),
        ("Which of these numbers are even: {items}?", "Remove the odd numbers from {items}"),
    ),
)
