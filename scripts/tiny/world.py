"""Tasks on the world: days, dates, clocks, units, money, and looking things up in a text or a table."""

import random

from scripts.tiny.task import Fields, Task
from scripts.tiny.words import COLOURS, FOODS, MONTH_DAYS, MONTHS, NAMES, OBJECTS, PLACES, WEEKDAYS, article, plural

UNITS = (
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilometres", "metres", 1000),
    ("kilograms", "grams", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("weeks", "days", 7),
    ("days", "hours", 24),
    ("years", "months", 12),
    ("dozens", "eggs", 12),
)


def _weekday(rng: random.Random) -> dict[str, str]:
    return {"day": rng.choice(WEEKDAYS), "n": str(rng.randint(2, 40))}


def _date(rng: random.Random) -> dict[str, str]:
    month = rng.randrange(12)
    day = rng.randint(1, MONTH_DAYS[month])
    return {"day": str(day), "month": MONTHS[month], "n": str(rng.randint(2, 20))}


def _date_after(fields: Fields) -> str:
    """The date n days later, in a year without a leap day."""
    month = MONTHS.index(fields["month"])
    day = int(fields["day"]) + int(fields["n"])
    if day > MONTH_DAYS[month]:
        day, month = day - MONTH_DAYS[month], (month + 1) % 12
    return f"{day} {MONTHS[month]}"


def _clock(rng: random.Random) -> dict[str, str]:
    return {"time": f"{rng.randrange(24)}:{rng.randrange(0, 60, 5):02d}", "n": str(rng.randrange(5, 60, 5))}


def _clock_after(fields: Fields) -> str:
    hours, minutes = map(int, fields["time"].split(":"))
    total = hours * 60 + minutes + int(fields["n"])
    return f"{total // 60 % 24}:{total % 60:02d}"


def _unit(rng: random.Random) -> dict[str, str]:
    large, small, _ = rng.choice(UNITS)
    return {"n": str(rng.randint(2, 60)), "large": large, "small": small}


def _converted(fields: Fields) -> str:
    factor = next(f for large, small, f in UNITS if (large, small) == (fields["large"], fields["small"]))
    return str(int(fields["n"]) * factor)


def _purchase(rng: random.Random) -> dict[str, str]:
    price = rng.randint(1, 60)
    return {"price": str(price), "paid": str(rng.randint(price + 1, 99))}


def _colours(rng: random.Random) -> dict[str, str]:
    count = rng.randint(2, 4)
    names, things, colours = rng.sample(NAMES, count), rng.sample(OBJECTS, count), rng.choices(COLOURS, k=count)
    text = " ".join(f"{n} has {article(c)} {o}." for n, c, o in zip(names, colours, things, strict=True))
    asked = rng.randrange(count)
    return {"text": text, "name": names[asked], "thing": things[asked]}


def _colour_of(fields: Fields) -> str:
    words = fields["text"].split()
    return words[words.index(fields["name"]) + 3]


def _whereabouts(rng: random.Random) -> dict[str, str]:
    count = rng.randint(2, 4)
    names, places = rng.sample(NAMES, count), rng.sample(PLACES, count)
    text = " ".join(f"{n} is at the {p}." for n, p in zip(names, places, strict=True))
    return {"text": text, "name": rng.choice(names)}


def _place_of(fields: Fields) -> str:
    words = fields["text"].split()
    return words[words.index(fields["name"]) + 4].rstrip(".")


def _owners(rng: random.Random) -> dict[str, str]:
    fields = _colours(rng)
    return {"text": fields["text"], "thing": fields["thing"]}


def _owner_of(fields: Fields) -> str:
    words = fields["text"].split()
    return words[words.index(fields["thing"] + ".") - 4]


def _table(rng: random.Random) -> dict[str, str]:
    rows, columns = rng.sample(NAMES, rng.randint(2, 4)), rng.sample(FOODS, 2)
    lines = [f"name | {' | '.join(plural(c) for c in columns)}"]
    lines += [f"{name} | {rng.randint(1, 40)} | {rng.randint(1, 40)}" for name in rows]
    return {"table": "\n".join(lines), "name": rng.choice(rows), "column": plural(rng.choice(columns))}


def _cell(fields: Fields) -> str:
    head, *rows = [[cell.strip() for cell in line.split("|")] for line in fields["table"].split("\n")]
    return next(row for row in rows if row[0] == fields["name"])[head.index(fields["column"])]


def _heights(rng: random.Random) -> dict[str, str]:
    names = rng.sample(NAMES, 3)
    order = [(names[0], names[1]), (names[1], names[2])]
    rng.shuffle(order)
    return {"text": " ".join(f"{a} is taller than {b}." for a, b in order)}


def _tallest(fields: Fields) -> str:
    words = fields["text"].replace(".", "").split()
    taller, shorter = words[0::5], words[4::5]
    return next(name for name in taller if name not in shorter)


WORLD_TASKS = (
    Task(
        "weekday",
        _weekday,
        lambda f: WEEKDAYS[(WEEKDAYS.index(f["day"]) + int(f["n"])) % 7],
        ("{day} and {n} days: {answer}", "{n} days after {day} is {answer}", "{day} + {n} days = {answer}"),
        ("Today is {day}. Which day is it in {n} days?", "Which day of the week comes {n} days after {day}?"),
    ),
    Task(
        "date",
        _date,
        _date_after,
        ("{day} {month} and {n} days: {answer}", "{n} days after {day} {month} is {answer}"),
        ("Today is {day} {month}. What is the date in {n} days?", "Which date comes {n} days after {day} {month}?"),
    ),
    Task(
        "clock",
        _clock,
        _clock_after,
        ("{time} and {n} minutes: {answer}", "{n} minutes after {time} it is {answer}"),
        ("It is {time}. What time is it in {n} minutes?", "Which time is {n} minutes later than {time}?"),
    ),
    Task(
        "units",
        _unit,
        _converted,
        ("{n} {large} in {small}: {answer}", "{n} {large} = so many {small}: {answer}"),
        ("How many {small} are {n} {large}?", "Please convert {n} {large} to {small}."),
    ),
    Task(
        "change",
        _purchase,
        lambda f: str(int(f["paid"]) - int(f["price"])),
        ("Price {price}, paid {paid}, change {answer}", "Paid {paid} for a price of {price}. Change: {answer}"),
        ("A thing costs {price} coins. I pay {paid}. How many coins do I get back?",),
        kin="subtract",
    ),
    Task(
        "colour_of",
        _colours,
        _colour_of,
        (
            "{text} Colour of the {thing} of {name}: {answer}",
            "{text} So the {thing} of {name} is {answer}",
            "{text}\n{name}, {thing}, colour\n{answer}",
            "{text}\n{thing}, colour\n{answer}",
            "{text} The {thing} is {answer}",
        ),
        ("{text} What colour is the {thing} that {name} has?", "Read this: {text} Which colour has the {thing}?"),
    ),
    Task(
        "place_of",
        _whereabouts,
        _place_of,
        ("{text} Place of {name}: {answer}", "{text} So {name} is at the {answer}", "{text}\n{name}, place\n{answer}"),
        ("{text} Where is {name}?", "Read this: {text} At which place can I find {name}?"),
    ),
    Task(
        "owner_of",
        _owners,
        _owner_of,
        (
            "{text} Owner of the {thing}: {answer}",
            "{text} So the {thing} is held by {answer}",
            "{text}\n{thing}, owner\n{answer}",
        ),
        ("{text} Who has the {thing}?", "Read this: {text} Whose is the {thing}?"),
    ),
    Task(
        "table",
        _table,
        _cell,
        (
            "{table}\n{name}, {column}: {answer}",
            "{table}\nSo {name} has {column}: {answer}",
            "{table}\n{name}\n{column}\n{answer}",
        ),
        (
            "{table}\nHow many {column} does {name} have?",
            "Look at the table.\n{table}\nGive the number of {column} of {name}.",
        ),
    ),
    Task(
        "tallest",
        _heights,
        _tallest,
        ("{text} The tallest is {answer}", "{text} Tallest: {answer}", "{text}\ntallest\n{answer}"),
        ("{text} Who is the tallest?", "Read this: {text} Which of the three is the tallest?"),
    ),
)
