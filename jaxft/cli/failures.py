"""An error becomes one clean message and an exit code.

What jaxft itself refuses (an exception meant for people, raised in jaxft's own code) is printed without a traceback;
`--traceback` shows it. Anything else is a bug, ours or a library's, and keeps its traceback.
"""

import contextlib
import sys
import traceback as traceback_
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxft.border.errors import ConfigError

PACKAGE = str(Path(__file__).resolve().parent.parent)


@dataclass
class Outcome:
    """How a verb ended."""

    code: int = 0


@contextlib.contextmanager
def told(verb: str, traceback: bool) -> Iterator[Outcome]:
    """Runs a verb; an error is told on stderr and becomes `outcome.code`."""
    outcome = Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        print(f"\njaxft {verb}: interrupted", file=sys.stderr)
        outcome.code = 130
    except BrokenPipeError:  # `jaxft schema | head`
        sys.stderr.close()
        outcome.code = 1
    except Exception as error:
        outcome.code = 2 if isinstance(error, ConfigError) else 1
        if traceback or not for_people(error):
            traceback_.print_exc()
            return
        message = str(error) or type(error).__name__
        print(f"jaxft {verb}: error: {message}" if "\n" not in message else f"jaxft {verb}: errors:", file=sys.stderr)
        if "\n" in message:
            print("\n".join(f"  {line}" for line in message.splitlines()), file=sys.stderr)


def for_people(error: Exception) -> bool:
    """Whether an error is a message to the user: raised by jaxft's own code, or an OSError such as a missing file."""
    if isinstance(error, OSError) or type(error).__module__.startswith("jaxft."):
        return True
    frames = traceback_.extract_tb(error.__traceback__)
    raised_here = bool(frames) and frames[-1].filename.startswith(PACKAGE)
    return raised_here and isinstance(error, ValueError | RuntimeError | FloatingPointError | ImportError)
