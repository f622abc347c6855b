"""The word lists of the little world: short, concrete, and few enough for a vocabulary of two thousand tokens."""

GIRLS = """Anna Clara Emma Grace Iris Kate Mia Nora Rosa Vera Zoe Ada Celia Greta Hanna Julia Lena Nina Petra Ruth
Tina""".split()
BOYS = "Ben Dan Finn Hugo Jack Leo Oscar Paul Sam Tom Will Bruno Erik Felix Ivan Karl Max Otto Simon".split()
NAMES = GIRLS + BOYS

PLACES = """garden kitchen school market park forest river beach barn library bakery station hill village bridge farm
tower harbour museum yard""".split()

OBJECTS = """ball book kite lamp hat coat key cup box drum bell boat spoon clock brush rope chair basket bucket candle
doll flute ring scarf shoe sock stone torch umbrella whistle map coin button blanket ladder mirror pencil pillow
plate wheel""".split()

COLOURS = "red blue green yellow black white brown grey pink purple orange silver".split()

FOODS = """apple pear plum cherry carrot onion potato tomato egg bun cake pie nut fig lemon melon peach bean pea
mushroom""".split()

ANIMALS = (
    "cat dog horse cow sheep goat pig duck hen goose rabbit mouse fox owl frog bear bee fish donkey squirrel".split()
)

ADJECTIVES = """happy sad tired hungry cold warm quiet loud small big old young kind brave clever proud angry calm
busy lazy wet dry clean dirty heavy light soft hard sweet sour new broken empty full quick slow bright dark long
short""".split()

NOUNS = """tree leaf flower grass bird cloud rain snow wind sun moon star sky road path field house door window wall
roof room table bed floor fire water milk bread butter cheese soup tea salt sugar honey rice paper letter story song
game word name friend mother father sister brother baby child teacher farmer baker sailor doctor king queen morning
evening night day week month year hour summer winter spring autumn hand foot head eye ear nose mouth hair wood iron
gold glass sand mud ship train cart bike wagon tail wing nest egg seed root fruit""".split()

VERBS = """walk run jump sing read write draw cook eat drink sleep wash climb swim dance build carry throw catch
paint""".split()

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS = "first second third fourth fifth sixth".split()

# What word and letter tasks draw from: every common word once, in a fixed order.
COMMON = tuple(dict.fromkeys(OBJECTS + COLOURS + FOODS + ANIMALS + ADJECTIVES + NOUNS + VERBS))
# Short words, for tasks that go letter by letter.
SHORT = tuple(word for word in COMMON if 3 <= len(word) <= 6)
PAST = {
    "walk": "walked", "run": "ran", "jump": "jumped", "sing": "sang", "read": "read", "write": "wrote", "draw": "drew",
    "cook": "cooked", "eat": "ate", "drink": "drank", "sleep": "slept", "wash": "washed", "climb": "climbed",
    "swim": "swam", "dance": "danced", "build": "built", "carry": "carried", "throw": "threw", "catch": "caught",
    "paint": "painted",
}  # fmt: skip

# Facts of the world, told again and again in the corpus: (young, sound, home, food).
ANIMAL_FACTS = {
    "cat": ("kitten", "meows", "house", "fish"),
    "dog": ("puppy", "barks", "kennel", "meat"),
    "horse": ("foal", "neighs", "stable", "hay"),
    "cow": ("calf", "moos", "barn", "grass"),
    "sheep": ("lamb", "bleats", "fold", "grass"),
    "goat": ("kid", "bleats", "hill", "leaves"),
    "pig": ("piglet", "grunts", "sty", "potatoes"),
    "duck": ("duckling", "quacks", "pond", "weeds"),
    "hen": ("chick", "clucks", "coop", "corn"),
    "goose": ("gosling", "honks", "pond", "grass"),
    "rabbit": ("bunny", "squeaks", "burrow", "carrots"),
    "mouse": ("pup", "squeaks", "hole", "cheese"),
    "fox": ("cub", "yelps", "den", "mice"),
    "owl": ("owlet", "hoots", "tree", "mice"),
    "frog": ("tadpole", "croaks", "pond", "flies"),
    "bear": ("cub", "growls", "cave", "honey"),
    "bee": ("larva", "buzzes", "hive", "nectar"),
    "donkey": ("foal", "brays", "stable", "hay"),
    "squirrel": ("kit", "chatters", "tree", "nuts"),
}
OPPOSITES = (
    ("happy", "sad"), ("cold", "warm"), ("quiet", "loud"), ("small", "big"), ("old", "young"), ("wet", "dry"),
    ("clean", "dirty"), ("heavy", "light"), ("soft", "hard"), ("sweet", "sour"), ("new", "old"), ("empty", "full"),
    ("quick", "slow"), ("bright", "dark"), ("long", "short"), ("busy", "lazy"),
)  # fmt: skip
MATERIALS = {
    "cup": "clay", "key": "iron", "hat": "wool", "coat": "wool", "box": "wood", "drum": "wood", "bell": "brass",
    "boat": "wood", "spoon": "silver", "basket": "straw", "bucket": "tin", "candle": "wax", "ring": "gold",
    "scarf": "wool", "shoe": "leather", "sock": "wool", "coin": "copper", "ladder": "wood", "mirror": "glass",
    "plate": "clay", "rope": "hemp", "pencil": "wood",
}  # fmt: skip
USES = {
    "lamp": "see in the dark", "umbrella": "keep dry in the rain", "key": "open a door", "cup": "drink tea",
    "spoon": "eat soup", "clock": "tell the time", "brush": "sweep the floor", "ladder": "reach the roof",
    "map": "find the way", "pencil": "write a letter", "blanket": "keep warm at night", "bucket": "carry water",
    "candle": "light a room", "basket": "carry fruit", "boat": "cross the river", "torch": "walk at night",
}  # fmt: skip


def plural(noun: str) -> str:
    """The plural of a noun of these lists: "cherry" -> "cherries"."""
    irregular = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "fish": "fish", "leaf": "leaves"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh")) or noun in ("potato", "tomato"):
        return noun + "es"
    return noun + "s"


def article(noun: str) -> str:
    """The noun with its indefinite article: "an apple"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def joined(parts: list[str]) -> str:
    """A list in prose: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
