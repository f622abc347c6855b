"""A task is three plain functions and some phrasings: draw an instance, solve it, say it.

Unusual: train and held-out are split by *instance*, not by sentence. An instance (say, add 41 and 27) falls on one
side by a hash of its fields, whatever their order and the phrasing, and `draw` only returns instances of the side
asked for. So an instance held out of the chats never occurs in the pretraining corpus either, in any wording.
"""

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Fields = Mapping[str, str]
HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Task:
    """A kind of exercise whose answer a plain function checks."""

    name: str
    make: Callable[[random.Random], dict[str, str]]
    """The fields of a random instance, as they are shown."""
    solve: Callable[[Fields], str]
    """The answer, computed from the fields alone."""
    worksheet: tuple[str, ...]
    """How the pretraining corpus writes it; `{answer}` is always last, bar a full stop."""
    ask: tuple[str, ...]
    """How a chat asks it: wordings that no worksheet has."""
    kin: str | None = None
    """The task with the same sums under another name, which shares its split."""


@dataclass(frozen=True)
class Instance:
    """One exercise: its task, its fields and its answer."""

    task: Task
    fields: Fields
    answer: str

    @property
    def key(self) -> str:
        """Names the instance whatever its wording."""
        return identity(self.task, self.fields)


def identity(task: Task, fields: Fields) -> str:
    """The task and the sorted words of its fields: 3 + 4 and 4 + 3, or two orders of one list, fall on one side."""
    return " ".join([task.kin or task.name, *sorted(" ".join(fields.values()).split())])


def held_out(key: str) -> bool:
    """Whether the instance of this key belongs to the held-out side."""
    return zlib.crc32(key.encode()) % 100 < HELD_OUT_PERCENT


def draw(task: Task, rng: random.Random, *, held: bool) -> Instance:
    """A random instance of the side asked for."""
    while True:
        fields = task.make(rng)
        if held_out(identity(task, fields)) == held:
            return Instance(task, fields, task.solve(fields))


def worksheet(instance: Instance, rng: random.Random) -> str:
    """The instance as one line of a worksheet, with its answer."""
    return rng.choice(instance.task.worksheet).format(**instance.fields, answer=instance.answer)


def worksheet_prompt(instance: Instance, rng: random.Random) -> str:
    """The worksheet line as far as the answer: what a base model completes."""
    return rng.choice(instance.task.worksheet).split("{answer}")[0].rstrip(" ").format(**instance.fields)


def question(instance: Instance, rng: random.Random) -> str:
    """The instance as a user asks it in a chat."""
    return rng.choice(instance.task.ask).format(**instance.fields)


def correct(completion: str, answer: str) -> bool:
    """Exact match, but for white space around it: the check of every task."""
    return completion.strip() == answer
