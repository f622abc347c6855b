"""The table of tasks, and which of them the quickstart teaches."""

from scripts.tiny.numeric import NUMBER_TASKS
from scripts.tiny.strings import STRING_TASKS
from scripts.tiny.task import Task
from scripts.tiny.world import WORLD_TASKS

TASKS: dict[str, Task] = {task.name: task for task in (*NUMBER_TASKS, *STRING_TASKS, *WORLD_TASKS)}

# What a base of four million parameters does well on a worksheet: a chat has only to call it up.
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
