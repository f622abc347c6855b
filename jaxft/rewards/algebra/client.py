"""Asks a worker, and ends one that takes too long."""

import contextlib
import functools
import importlib.util
import json
import select
import subprocess
import sys
import threading
import weakref
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
START = 60.0
"""Seconds that a new worker has to read its libraries and answer for the first time."""


def installed() -> bool:
    """Whether math-verify can be imported."""
    return importlib.util.find_spec("math_verify") is not None


class Pool:
    """One worker, begun when it is first asked, and again after one that was ended. Threads take turns."""

    def __init__(self, timeout: float) -> None:
        """``timeout``: seconds for one answer."""
        self.timeout = timeout
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._known: dict[tuple[str, str], bool] = {}

    def equal(self, said: str, right: str) -> bool:
        """Whether two answers are equal as mathematics; False where that is not found out."""
        with self._lock:
            if (said, right) not in self._known:
                self._known[said, right] = self._ask(said, right)
                if len(self._known) > 10_000:
                    del self._known[next(iter(self._known))]
            return self._known[said, right]

    def _ask(self, said: str, right: str) -> bool:
        if self._worker is None:
            self._worker = self._begun()
        answer = _answer(self._worker, said, right, self.timeout)
        if answer is None:  # took too long, too much memory, or cannot be understood
            self._worker.kill()
            self._worker.wait()
            self._worker = None
        return bool(answer)

    def _begun(self) -> "subprocess.Popen[str]":
        worker = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, bufsize=1, start_new_session=True,
        )  # fmt: skip
        weakref.finalize(self, _end, worker)
        if _answer(worker, "1", "1", START) is not True:
            worker.kill()
            raise RuntimeError(f"math-verify does not run: {sys.executable} {WORKER} ends at once; try it by hand")
        return worker


def _answer(worker: "subprocess.Popen[str]", said: str, right: str, timeout: float) -> bool | None:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(json.dumps([said, right]) + "\n")
        if not select.select([worker.stdout], [], [], timeout)[0]:
            return None
        line = worker.stdout.readline()
    except OSError:
        return None
    return json.loads(line) if line else None


def _end(worker: "subprocess.Popen[str]") -> None:
    worker.kill()
    worker.wait()
    for pipe in filter(None, (worker.stdin, worker.stdout)):
        with contextlib.suppress(OSError):
            pipe.close()


@functools.cache
def pool(timeout: float) -> Pool:
    """One for all rewards with the same limit."""
    return Pool(timeout)
