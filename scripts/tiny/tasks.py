"""The table of tasks, and which of them the quickstart teaches."""

from scripts.tiny.numeric import NUMBER_TASKS
from scripts.tiny.strings import STRING_TASKS
from scripts.tiny.task import Task
from scripts.tiny.world import WORLD_TASKS

TASKS: dict[str, Task] = {task.name: task for task in (*NUMBER_TASKS, *STRING_TASKS, *WORLD_TASKS)}

# Drawn twice as often as the others in the corpus.
EASY = (
    "sort_numbers",
    "largest",
    "smallest",
    "reverse_words",
    "nth_word",
    "remove_word",
    "replace_word",
    "count_word",
    "colour_of",
    "place_of",
    "owner_of",
    "table",
)

# What the base answers without a fault on a worksheet, so that a chat has only to call it up. Looking things up in a
# text is left out: the base does it in every second exercise, and an adapter does not teach that in minutes.
QUICKSTART = tuple(name for name in EASY if name not in ("colour_of", "place_of", "owner_of", "table"))
