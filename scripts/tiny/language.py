"""Simple English: stories whose later sentences follow from the earlier ones.

Unusual: a story is told from a small state (who has what, who is where, how many are left), so what comes next can
often be worked out from what came before, and perplexity measures more than spelling.
"""

import itertools
import random
from dataclasses import dataclass

from scripts.tiny import task as tasklib
from scripts.tiny import words
from scripts.tiny.numeric import NUMBER_TASKS

ADD, SUBTRACT = NUMBER_TASKS[0], NUMBER_TASKS[1]
TIMES = (
    "In the morning",
    "In the evening",
    "One day",
    "After school",
    "On Monday",
    "On Sunday",
    "Last week",
    "At noon",
)
WEATHERS = (
    ("It rained all night", "the path was wet", "slipped and fell", "an umbrella"),
    ("The snow was deep", "the road was white", "could not find the way", "a map"),
    ("The wind was strong", "the roof shook", "could not sleep", "a blanket"),
    ("The sun was hot", "the grass was dry", "was very thirsty", "a cup of water"),
    ("There was fog on the river", "the bridge was hidden", "lost the way", "a torch"),
    ("It was very cold", "the water was ice", "had cold hands", "a scarf"),
)
PATHS = "the old bridge,the long road,the dark forest,the green field,the small gate,the steep stairs".split(",")
FINDS = (
    ("under the {place} door", "because it had a shine in the light"),
    ("behind a tree", "because the {animal} sat beside it"),
    ("in a deep hole", "because someone had seen it fall"),
    ("on top of the wall", "because the wind had carried it there"),
    ("under a pile of leaves", "because a corner of it was {colour}"),
)


@dataclass(frozen=True)
class Person:
    """A name and its pronouns."""

    name: str
    he: str
    his: str
    him: str


def people(rng: random.Random, count: int) -> list[Person]:
    """Different people, with the pronouns that fit."""
    return [
        Person(name, "she", "her", "her") if name in words.GIRLS else Person(name, "he", "his", "him")
        for name in rng.sample(words.NAMES, count)
    ]


def total(rng: random.Random, top: int) -> tuple[int, int]:
    """Two numbers to add, from the training side of the task `add`."""
    while True:
        a, b = rng.randint(1, top), rng.randint(1, top)
        if not tasklib.held_out(tasklib.identity(ADD, {"a": str(a), "b": str(b)})):
            return a, b


def difference(rng: random.Random, top: int) -> tuple[int, int]:
    """A number and a smaller one, from the training side of the task `subtract`."""
    while True:
        a = rng.randint(2, top)
        b = rng.randint(1, a - 1)
        if not tasklib.held_out(tasklib.identity(SUBTRACT, {"a": str(a), "b": str(b)})):
            return a, b


def some(count: int, noun: str) -> str:
    return f"{count} {noun if count == 1 else words.plural(noun)}"


def lost(rng: random.Random) -> str:
    """Something is lost, looked for, and found for a reason."""
    a, b = people(rng, 2)
    thing, colour, animal = rng.choice(words.OBJECTS), rng.choice(words.COLOURS), rng.choice(words.ANIMALS)
    first, second, third = rng.sample(words.PLACES, 3)
    where, why = rng.choice(FINDS)
    where, why = where.format(place=third), why.format(animal=animal, colour=colour)
    return " ".join(
        (
            f"{rng.choice(TIMES)} {a.name} lost {a.his} {colour} {thing}.",
            f"{a.name} looked at the {first}, but the {thing} was not there.",
            rng.choice((f"Then {a.he} looked at the {second}.", f"{a.name} went to the {second} and looked again.")),
            f'"Have you seen my {thing}?" {a.he} asked {b.name}.',
            rng.choice((f'"No," said {b.name}, "but I can help you."', f'"Not yet," said {b.name}. "Let us look."')),
            f"They went to the {third} together.",
            f"There they found the {colour} {thing} {where}, {why}.",
            rng.choice((f"{a.name} was happy and thanked {b.name}.", f'"Thank you, {b.name}!" said {a.name}.')),
        )
    )


def shop(rng: random.Random) -> str:
    """Things are bought, a price is paid, the change is counted."""
    (a,) = people(rng, 1)
    food, place = rng.choice(words.FOODS), rng.choice(("market", "bakery", "shop"))
    paid, price = difference(rng, 50)
    count, eaten = difference(rng, 12)
    ending = rng.choice(
        (
            f"{a.he.capitalize()} carried the {words.plural(food)} home in a basket.",
            f"At home {a.his} mother made {words.article(food)} pie.",
            f"On the way {a.he} ate {eaten}, so {count - eaten} {'was' if count - eaten == 1 else 'were'} left.",
        )
    )
    return (
        f"{a.name} went to the {place} to buy {words.plural(food)}. {a.he.capitalize()} took {some(count, food)}. "
        f'"That is {some(price, "coin")}," said the {rng.choice(("old man", "farmer", "baker", "woman"))}. '
        f"{a.name} gave {some(paid, 'coin')} and got {some(paid - price, 'coin')} back. {ending}"
    )


def gifts(rng: random.Random) -> str:
    """Things change hands; the end says who has what."""
    persons = people(rng, 3)
    things = rng.sample(words.OBJECTS, 3)
    owner = dict(zip(things, persons, strict=True))
    said = [f"{p.name} had {words.article(t)}." for t, p in owner.items()]
    for _ in range(rng.randint(1, 4)):
        thing = rng.choice(things)
        giver = owner[thing]
        taker = rng.choice([p for p in persons if p is not giver])
        owner[thing] = taker
        said.append(
            rng.choice(
                (
                    f"{giver.name} gave the {thing} to {taker.name}.",
                    f"{taker.name} took the {thing} from {giver.name}.",
                    f"Then {giver.name} let {taker.name} have the {thing}.",
                )
            )
        )
    rng.shuffle(things)
    ends = [f"{owner[t].name} had the {t}" for t in things]
    return " ".join(said) + f" In the end {words.joined(ends)}."


def weather(rng: random.Random) -> str:
    """A cause, what followed from it, and what helped."""
    a, b = people(rng, 2)
    cause, effect, trouble, help_ = rng.choice(WEATHERS)
    place = rng.choice(words.PLACES)
    return " ".join(
        (
            rng.choice((f"{cause}, so {effect}.", f"{cause}. That is why {effect}.")),
            f"{a.name} wanted to go to the {place}, but {a.he} {trouble}.",
            f"{b.name} saw {a.him} and brought {help_}.",
            rng.choice((f'"{help_.capitalize()} is what I need," said {a.name}.', f"With {help_} it was easy.")),
            f"Together they went to the {place}.",
        )
    )


def trip(rng: random.Random) -> str:
    """A way through several places, told forwards and then back."""
    (a,) = people(rng, 1)
    places = rng.sample(words.PLACES, rng.randint(3, 4))
    path, verb = rng.choice(PATHS), rng.choice(("walked", "went", "ran", "rode a bike"))
    back = [f"the {p}" for p in reversed(places[:-1])]
    return (
        f"{rng.choice(TIMES)} {a.name} {verb} from the {places[0]} to the {places[1]} by {path}. "
        + " ".join(f"From the {p} {a.he} went on to the {q}." for p, q in itertools.pairwise(places[1:]))
        + f" {rng.choice(('It was far', 'It was not far', 'The way was long', 'The way was good'))}."
        + f" On the way back {a.he} came by {words.joined(back)}."
    )


def pet(rng: random.Random) -> str:
    """An animal and what is true of it, inside a story."""
    a, b = people(rng, 2)
    animal = rng.choice(sorted(words.ANIMAL_FACTS))
    young, sound, home, food = words.ANIMAL_FACTS[animal]
    mood, colour = rng.choice(("hungry", "tired", "happy", "afraid")), rng.choice(words.COLOURS)
    reason = {
        "hungry": f"{a.name} gave it {food}, and it was hungry no more.",
        "tired": f"So it went to its {home} and slept.",
        "happy": f"It {sound}, because {a.name} had come back.",
        "afraid": f"It hid in its {home} until the loud noise was over.",
    }[mood]
    return (
        f"{a.name} had {words.article(colour)} {animal}. The {animal} lived in a {home}. "
        f"One day it was {mood}. {reason} "
        f'"Is it {words.article(young)}?" asked {b.name}. '
        f'"{rng.choice(("No, it is old now", "Yes, it is still small"))}," '
        f"said {a.name}. {words.article(animal).capitalize()} {sound} and likes {food}."
    )


def counting(rng: random.Random) -> str:
    """A heap that grows and shrinks."""
    a, b = people(rng, 2)
    noun = rng.choice(words.FOODS + words.OBJECTS)
    x, y = total(rng, 40)
    many = words.plural(noun)
    if rng.random() < 0.5:
        return (
            f"{a.name} had {some(x, noun)}. {b.name} brought {y} more. Now there were {x + y} {many}. "
            f"They put the {many} in a {rng.choice(('box', 'basket', 'bucket'))}."
        )
    x, y = difference(rng, 60)
    return (
        f"There were {some(x, noun)} at the {rng.choice(words.PLACES)}. {a.name} took {y} of them away. "
        f"Then {x - y} {'was' if x - y == 1 else 'were'} left. {b.name} counted them to be sure: {x - y}."
    )


def day(rng: random.Random) -> str:
    """A day in order, with hours that rise."""
    (a,) = people(rng, 1)
    hours = sorted(rng.sample(range(6, 21), 4))
    verbs = rng.sample(sorted(words.PAST), 4)
    places = rng.sample(words.PLACES, 4)
    lines = [f"At {h} {a.he} {words.PAST[v]} at the {p}." for h, v, p in zip(hours, verbs, places, strict=True)]
    asked = rng.randrange(4)
    return (
        f"This is the day of {a.name}. "
        + " ".join(lines)
        + f" So at {hours[asked]} {a.name} was at the {places[asked]}."
        f" Before {a.he} could {verbs[3]}, {a.he} had to {verbs[2]}. Then the day was over."
    )


def letter(rng: random.Random) -> str:
    """A short letter with an invitation."""
    a, b = people(rng, 2)
    date, month = rng.randint(1, 28), rng.choice(words.MONTHS)
    place, thing, food = rng.choice(words.PLACES), rng.choice(words.OBJECTS), rng.choice(words.FOODS)
    return (
        f"Dear {a.name},\n{rng.choice(('how are you', 'I hope you are well', 'thank you for your letter'))}. "
        f"On {date} {month} we meet at the {place}. Please bring your {thing}. I will bring {words.plural(food)}. "
        f"{rng.choice(('Come early', 'Do not be late', 'Tell your sister', 'Tell your brother'))}.\n"
        f"Your friend {b.name}"
    )


def facts(rng: random.Random) -> str:
    """Some facts of the world, said plainly."""
    said = []
    for _ in range(rng.randint(3, 6)):
        animal, thing = rng.choice(sorted(words.ANIMAL_FACTS)), rng.choice(sorted(words.MATERIALS))
        young, sound, home, food = words.ANIMAL_FACTS[animal]
        use = rng.choice(sorted(words.USES))
        low, high = rng.choice(words.OPPOSITES)
        said.append(
            rng.choice(
                (
                    f"{words.article(young).capitalize()} is a young {animal}.",
                    f"The {animal} {sound}.",
                    f"{words.article(animal).capitalize()} lives in a {home} and likes {food}.",
                    f"{words.article(thing).capitalize()} is made of {words.MATERIALS[thing]}.",
                    f"You need {words.article(use)} to {words.USES[use]}.",
                    f"The opposite of {low} is {high}.",
                )
            )
        )
    return " ".join(said)


STORIES = (lost, shop, gifts, weather, trip, pet, counting, day, letter, facts)


def story(rng: random.Random) -> str:
    """One story of any kind."""
    return rng.choice(STORIES)(rng)
