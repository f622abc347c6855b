"""The second domain: the log of a pilot on an invented coast, in words that the corpus does not have.

Unusual: the log obeys laws of its own (the wind turns one point a watch, the depth follows the ground, the tide the
moon mark), so a model adapted to the domain learns more than its spelling.
"""

import random

SHIPS = "Brindlewake Ostermoor Quillhaven Tarnfjell Vossgrim Yarrowmast Kelderling Drakkamere".split()
PILOTS = "Aldous Brannoch Cothrin Delvane Eskrigg Fennimore Garrowby Hathersage".split()
POINTS = ("norrend", "norrvost", "vost", "sudvost", "sudrend", "sudorl", "orl", "norrorl")
# Ground, the fathoms it lies at, and what the lead brings up.
GROUNDS = (
    ("thrummel", 4, "shell"),
    ("skarn", 9, "black gravel"),
    ("vellick", 14, "blue clay"),
    ("grindle", 21, "coral"),
    ("ossary", 33, "fine ash"),
    ("murrow", 46, "nothing"),
)
TIDES = {"horn": "flood", "shield": "stand", "sickle": "ebb", "veil": "slack"}
SAILS = ("mizzen-scaith", "lug-tarrow", "fore-brimmel", "stay-wick")
MARKS = "Harrow Stack,Old Wen,the Candlers,Grey Sister,Mother Loom,the Nine Teeth,Saltgate,Cold Anvil".split(",")
BEASTS = ("orrelfish", "a pod of harks", "two wendlings", "a great skelmir", "gannocks")


def log(rng: random.Random) -> str:
    """One log: a heading and four to seven watches."""
    ship, pilot = rng.choice(SHIPS), rng.choice(PILOTS)
    point, turn = rng.randrange(8), rng.choice((-1, 1))
    moon = rng.choice(sorted(TIDES))
    marks = rng.sample(MARKS, 3)
    lines = [f"LOG of the {ship}, pilot {pilot}, moon mark {moon}, tide on the {TIDES[moon]}."]
    for bell in range(1, rng.randint(4, 7) + 1):
        lines.append(_watch(rng, bell, POINTS[point], marks))
        point = (point + turn) % 8
    lines.append(f"Moored by {marks[-1]}. {pilot} signs for the {ship}.")
    return "\n".join(lines)


def _watch(rng: random.Random, bell: int, wind: str, marks: list[str]) -> str:
    ground, fathoms, lead = rng.choice(GROUNDS)
    line = f"Bell {bell}. Wind {wind}. Sounded {fathoms} fathom over {ground}, lead brought {lead}."
    if fathoms < 10:
        line += f" Struck the {rng.choice(SAILS)} and crept by {rng.choice(marks)}."
    elif fathoms > 30:
        line += f" Set the {rng.choice(SAILS)} and ran free."
    else:
        line += f" Held {wind}-wise, {rng.choice(marks)} abeam."
    if rng.random() < 0.3:
        line += f" Seen: {rng.choice(BEASTS)}."
    return line
