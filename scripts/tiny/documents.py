"""The pretraining documents: pages of stories, worksheets, and lessons told in prose.

Unusual: no chat is among them, no question as a chat asks it, and no held-out instance. The base has the skills in
worksheet form only; fine-tuning teaches it to answer.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator

from scripts.tiny import task as tasklib
from scripts.tiny import words
from scripts.tiny.language import Person, people, story
from scripts.tiny.talk import talk
from scripts.tiny.tasks import EASY, TASKS

# The easy tasks come twice as often as the others.
DECK = (*TASKS.values(), *(TASKS[name] for name in EASY))
# About as many words and digits as fit into 512 tokens with the punctuation.
LONGEST = 350
HEADS = ("Exercises", "Worksheet", "Homework", "Lesson {n}", "Page {n}", "Practice", "Test {n}")


def page_of_stories(rng: random.Random) -> str:
    """Two to four stories, one paragraph each; every third is talk."""
    return "\n\n".join((talk if rng.random() < 0.33 else story)(rng) for _ in range(rng.randint(2, 4)))


def fitting(lines: Iterator[str]) -> list[str]:
    """The first of these lines, as many as make a document that is not cut."""
    kept, size = [], 0
    for line in lines:
        size += len(line.split()) + sum(map(str.isdigit, line))
        if size > LONGEST:
            break
        kept.append(line)
    return kept


def worksheet(rng: random.Random, *, held: bool = False) -> str:
    """Up to twenty exercises with answers: of one kind, in one wording, or mixed."""
    kind = rng.random()
    task = rng.choice(DECK)
    if kind < 0.6:
        deck = DECK
    elif kind < 0.85:
        deck = (task,)
    else:
        deck = (dataclasses.replace(task, worksheet=(rng.choice(task.worksheet),)),)
    count = rng.randint(6, 20)
    drawn = (tasklib.draw(rng.choice(deck), rng, held=held) for _ in range(count))
    lines = fitting(tasklib.worksheet(instance, rng) for instance in drawn)
    stop = "." if rng.random() < 0.2 else ""
    gap = "\n\n" if any("\n" in line for line in lines) else "\n"
    head = f"{rng.choice(HEADS).format(n=rng.randint(1, 99))}\n\n" if rng.random() < 0.5 else ""
    return head + gap.join(line + stop for line in lines)


def lesson(rng: random.Random, *, held: bool = False) -> str:
    """Exercises told in prose: a teacher writes the beginning, a child the answer."""
    a, b = people(rng, 2)
    mood = rng.choice(("kind", "old", "young", "quick"))
    opening = f"The teacher was {mood}. {a.name} and {b.name} were at the school."
    told = (_told(rng, rng.choice((a, b)), held=held) for _ in range(rng.randint(4, 8)))
    return "\n".join(fitting(itertools.chain((opening,), told)))


def _told(rng: random.Random, who: Person, *, held: bool) -> str:
    instance = tasklib.draw(rng.choice(DECK), rng, held=held)
    prompt = tasklib.worksheet_prompt(instance, rng)
    return rng.choice(
        (
            f'The teacher wrote "{prompt}" on the wall. {who.name} wrote "{instance.answer}".',
            f'"{prompt}" read {who.name}. Then {who.he} wrote: {instance.answer}',
            f'Next was "{prompt}" and {who.name} knew it: {instance.answer}',
        )
    )


def vocabulary(rng: random.Random) -> str:
    """Lists of words, as they begin a line and as they stand within one."""
    chosen = rng.sample((*words.COMMON, *words.NAMES, *words.PLACES, "user", "assistant", "system"), 24)
    return "\n".join(" ".join(chosen[i : i + 4]) for i in range(0, 24, 4))


def document(rng: random.Random, *, held: bool = False) -> str:
    """One document of the corpus; `held` takes its exercises from the held-out side."""
    kind = rng.random()
    if kind < 0.38:
        return page_of_stories(rng)
    if kind < 0.88:
        return worksheet(rng, held=held)
    if kind < 0.98:
        return lesson(rng, held=held)
    return vocabulary(rng)
