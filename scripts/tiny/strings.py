"""Tasks on lists of words and on the letters of a word."""

import random

from scripts.tiny.task import Fields, Task
from scripts.tiny.words import COMMON, ORDINALS, SHORT


def _words(rng: random.Random) -> dict[str, str]:
    return {"items": " ".join(rng.sample(COMMON, rng.randint(3, 5)))}


def _few_words(rng: random.Random) -> dict[str, str]:
    return {"items": " ".join(rng.sample(COMMON, rng.randint(3, 4)))}


def _words_and_one(rng: random.Random) -> dict[str, str]:
    items = rng.sample(COMMON, rng.randint(3, 5))
    return {"items": " ".join(items), "word": rng.choice(items)}


def _words_and_two(rng: random.Random) -> dict[str, str]:
    *items, new = rng.sample(COMMON, rng.randint(4, 6))
    return {"items": " ".join(items), "word": rng.choice(items), "new": new}


def _words_and_place(rng: random.Random) -> dict[str, str]:
    items = rng.sample(COMMON, rng.randint(3, 5))
    return {"items": " ".join(items), "place": rng.choice(ORDINALS[: len(items)])}


def _repeated(rng: random.Random) -> dict[str, str]:
    word, *others = rng.sample(COMMON, 3)
    items = [word] * rng.randint(1, 4) + rng.choices(others, k=rng.randint(1, 4))
    rng.shuffle(items)
    return {"items": " ".join(items), "word": word}


def _word(rng: random.Random) -> dict[str, str]:
    return {"word": rng.choice(SHORT)}


def _two_words(rng: random.Random) -> dict[str, str]:
    return {"items": " ".join(rng.sample(SHORT, 2))}


def _word_and_letter(rng: random.Random) -> dict[str, str]:
    word = rng.choice(SHORT)
    return {"word": word, "letter": rng.choice(word)}


def _word_and_any_letter(rng: random.Random) -> dict[str, str]:
    word = rng.choice(COMMON)
    return {"word": word, "letter": rng.choice(word if rng.random() < 0.7 else "aeioulnrst")}


def _word_and_two_letters(rng: random.Random) -> dict[str, str]:
    word = rng.choice(SHORT)
    letter = rng.choice(word)
    return {"word": word, "letter": letter, "new": rng.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c != letter])}


def _spelled(word: str) -> str:
    return " ".join(word)


def _nth(fields: Fields) -> str:
    return fields["items"].split()[ORDINALS.index(fields["place"])]


def _without(fields: Fields) -> str:
    return " ".join(word for word in fields["items"].split() if word != fields["word"])


def _replaced(fields: Fields) -> str:
    return " ".join(fields["new"] if word == fields["word"] else word for word in fields["items"].split())


STRING_TASKS = (
    Task(
        "reverse_words",
        _few_words,
        lambda f: " ".join(reversed(f["items"].split())),
        (
            "Reverse: {items} -> {answer}",
            "{items} backwards: {answer}",
            "Turn round {items}. Answer: {answer}",
            "Words: {items}\nReversed: {answer}",
            "{items}\nreversed\n{answer}",
        ),
        (
            "Please write these words in reverse order: {items}",
            "Can you turn this list around? {items}",
            "Say these words from last to first: {items}",
        ),
    ),
    Task(
        "sort_words",
        _few_words,
        lambda f: " ".join(sorted(f["items"].split())),
        ("By letter: {items} -> {answer}", "From a to z: {items} gives {answer}", "{items}\na to z\n{answer}"),
        (
            "Please put these words in the order of the alphabet: {items}",
            "Order these words as a dictionary does: {items}",
        ),
    ),
    Task(
        "nth_word",
        _words_and_place,
        _nth,
        (
            "The {place} of {items}: {answer}",
            "{items}. The {place} word is {answer}",
            "Words: {items}\nThe {place}: {answer}",
            "{items}\n{place}\n{answer}",
        ),
        ("What is the {place} word in this list: {items}?", "Here are some words: {items}. Give me the {place} one."),
    ),
    Task(
        "remove_word",
        _words_and_one,
        _without,
        (
            "Strike {word}: {items} -> {answer}",
            "{items} without {word}: {answer}",
            "Words: {items}\nWithout {word}: {answer}",
            "{items}\nwithout {word}\n{answer}",
        ),
        ("Remove the word {word} from this list: {items}", "Please repeat this list but leave out {word}: {items}"),
    ),
    Task(
        "replace_word",
        _words_and_two,
        _replaced,
        (
            "Swap {word} for {new}: {items} -> {answer}",
            "{items} with {new} for {word}: {answer}",
            "Words: {items}\n{new} for {word}: {answer}",
            "{items}\n{new} for {word}\n{answer}",
        ),
        ("Replace {word} by {new} in this list: {items}", "Please change {word} to {new}: {items}"),
    ),
    Task(
        "count_word",
        _repeated,
        lambda f: str(f["items"].split().count(f["word"])),
        (
            "Count {word}: {items} -> {answer}",
            "{items}. Count of {word}: {answer}",
            "Words: {items}\n{word}: {answer}",
            "{items}\ncount {word}\n{answer}",
        ),
        ("How many times does {word} occur in this list: {items}?", "How often do you see {word} here? {items}"),
    ),
    Task(
        "upper",
        _two_words,
        lambda f: f["items"].upper(),
        ("Capitals: {items} -> {answer}", "{items} in capitals: {answer}", "{items}\ncapitals\n{answer}"),
        ("Write this in upper case: {items}", "Please shout these words: {items}"),
    ),
    Task(
        "spell",
        _word,
        lambda f: _spelled(f["word"]),
        ("Spell {word}: {answer}", "{word} is written {answer}", "{word}\nletters\n{answer}"),
        ("How do you spell {word}?", "Write {word} letter by letter."),
    ),
    Task(
        "reverse_letters",
        _word,
        lambda f: _spelled(f["word"][::-1]),
        ("Spell {word} backwards: {answer}", "{word} from the end: {answer}", "{word}\nletters reversed\n{answer}"),
        ("Write the letters of {word} in reverse.", "How do you spell {word} from the end to the start?"),
    ),
    Task(
        "count_letter",
        _word_and_any_letter,
        lambda f: str(f["word"].count(f["letter"])),
        ("Count {letter} in {word}: {answer}", "{word} has {letter} so many times: {answer}"),
        ("How many times does the letter {letter} occur in {word}?", "How often is {letter} in the word {word}?"),
    ),
    Task(
        "remove_letter",
        _word_and_letter,
        lambda f: _spelled(f["word"].replace(f["letter"], "")),
        ("Spell {word} without {letter}: {answer}", "{word}, strike {letter}: {answer}"),
        (
            "Remove the letter {letter} from {word} and spell the rest.",
            "Write {word} letter by letter, but leave out {letter}.",
        ),
    ),
    Task(
        "replace_letter",
        _word_and_two_letters,
        lambda f: _spelled(f["word"].replace(f["letter"], f["new"])),
        ("Spell {word} with {new} for {letter}: {answer}", "{word}, {letter} to {new}: {answer}"),
        (
            "Replace {letter} by {new} in {word} and spell it.",
            "Write {word} letter by letter with {new} instead of {letter}.",
        ),
    ),
)
