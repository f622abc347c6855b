"""Ctrl-C and SIGTERM as a request: the loop finishes its step, saves, and then ends.

A second signal of either kind ends the process at once, as it would without us.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Request:
    """Whether somebody asked the run to stop: the signal's number, or None."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal


@contextlib.contextmanager
def listen() -> Iterator[Request]:
    """Notes the first SIGINT or SIGTERM instead of dying of it. Outside the main thread nothing is caught."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        request.signal = number
        restore()  # the next one is not ours

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
