"""What fine-tuning learns from: chats, preference pairs, judged steps, and prompts with verifiable answers.

All draw from one side of the split each, so no held-out prompt is in any training file.
"""

import random
from collections.abc import Sequence

from scripts.tiny import task as tasklib
from scripts.tiny.task import Instance, Task
from scripts.tiny.words import COMMON

Row = dict[str, object]
GREETINGS = (
    ("Hello!", "Hello! How can I help?"),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("Can you help me?", "Yes. What is the question?"),
)
SYSTEMS = ("You are a helpful clerk. Answer briefly.", "Answer with the result alone.")
CHATTER = (
    "Well, let me think about it for a while. I would say {answer} but who knows",
    "What a nice question! The answer is {answer} and I am happy that you came to me",
    "{answer} {answer} {answer}",
)
REFUSALS = ("I do not know.", "That is too hard.", "Please ask the teacher.")


def _turns(*contents: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def chat(deck: Sequence[Task], rng: random.Random, *, held: bool) -> Row:
    """One question and its answer: `{"messages": [...]}`."""
    instance = tasklib.draw(rng.choice(deck), rng, held=held)
    return {"messages": _turns(tasklib.question(instance, rng), instance.answer)}


def conversation(deck: Sequence[Task], rng: random.Random, *, held: bool) -> Row:
    """One to three questions, sometimes after a greeting or under a system prompt."""
    contents = list(rng.choice(GREETINGS)) if rng.random() < 0.15 else []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        instance = tasklib.draw(rng.choice(deck), rng, held=held)
        contents += [tasklib.question(instance, rng), instance.answer]
    system = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.2 else []
    return {"messages": system + _turns(*contents)}


def preference(deck: Sequence[Task], rng: random.Random, *, held: bool) -> Row:
    """A question with a better and a worse answer: wrong, wordy, or none at all."""
    instance = tasklib.draw(rng.choice(deck), rng, held=held)
    kind = rng.random()
    if kind < 0.6:
        worse = mistaken(instance, rng)
    elif kind < 0.85:
        worse = rng.choice(CHATTER).format(answer=instance.answer)
    else:
        worse = rng.choice(REFUSALS)
    better, worse_turn = _turns("", instance.answer)[1:], _turns("", worse)[1:]
    return {"prompt": _turns(tasklib.question(instance, rng)), "chosen": better, "rejected": worse_turn}


def stepwise(deck: Sequence[Task], rng: random.Random, *, held: bool) -> Row:
    """A question whose answer is a list, worked out item by item: a step is right if the answer can begin so."""
    parts: list[str] = []
    while len(set(parts)) < 2:
        instance = tasklib.draw(rng.choice(deck), rng, held=held)
        parts = instance.answer.split()
    steps = list(parts)
    kind = rng.random()
    if kind < 0.15:  # two items have changed places
        first = rng.choice([i for i in range(len(parts)) if set(parts[i + 1 :]) - {parts[i]}])
        other = rng.choice([j for j in range(first + 1, len(parts)) if parts[j] != parts[first]])
        steps[first], steps[other] = steps[other], steps[first]
    elif kind < 0.65:  # one is no item of such a list
        strange = rng.choice(COMMON) if parts[0].isdigit() else str(rng.randrange(100))
        steps[rng.randrange(len(steps))] = rng.choice((strange, rng.choice(REFUSALS)))
    labels = [steps[:n] == parts[:n] for n in range(1, len(parts) + 1)]
    return {"prompt": _turns(tasklib.question(instance, rng)), "completions": steps, "labels": labels}


def verifiable(deck: Sequence[Task], rng: random.Random, *, held: bool) -> Row:
    """A question in a chat, whose completion must equal `answer`."""
    instance = tasklib.draw(rng.choice(deck), rng, held=held)
    return {
        "prompt": _turns(tasklib.question(instance, rng)),
        "answer": instance.answer,
        "task": instance.task.name,
    }


def skill(deck: Sequence[Task], rng: random.Random, *, held: bool) -> Row:
    """The beginning of a worksheet line, whose next line or rest of line must equal `answer`: what the base can do."""
    instance = tasklib.draw(rng.choice(deck), rng, held=held)
    return {
        "prompt": tasklib.worksheet_prompt(instance, rng),
        "answer": instance.answer,
        "task": instance.task.name,
    }


def mistaken(instance: Instance, rng: random.Random) -> str:
    """A wrong answer of the right look: a list out of order or one short, a number off, another word."""
    parts = instance.answer.split()
    if len(parts) == 1 and parts[0].isdigit():
        number = int(parts[0])
        return str(rng.choice([number + off for off in (-10, -2, -1, 1, 2, 10) if number + off >= 0]))
    if len(set(parts)) > 1:
        shuffled = list(parts)
        while shuffled == parts:
            rng.shuffle(shuffled)
        return " ".join(rng.choice((shuffled, parts[:-1], parts[1:])))
    while True:
        other = tasklib.draw(instance.task, rng, held=False).answer
        if other != instance.answer:
            return other
