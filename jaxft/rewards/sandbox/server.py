"""The process that programs are forked from. It reads requests from a socket and never sees a program itself.

Each request becomes two processes: a watcher, which lives outside of the program's process numbers and ends it at its
time or when the one who asked lets go, and the program's. No program outlives its watcher, no watcher the server, and
the server not the run.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

from . import candidate, confine, examiner, kernel
from .confine import Limits

FILES = 4
"""Most that come with a request: what to tell, the program's text, its channel or output, its input or verdict."""
MOST_FILES = 1 << 20
"""Linux's own bound on the number of a file."""
PRELOADED = (
    "array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "hashlib", "heapq", "io", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
ROLES: dict[str, Callable[[list[int]], None]] = {
    "functions": candidate.functions,
    "script": candidate.script,
    "examiner": examiner.main,
}


def main(control: int, way: str, folder: str, packages: list[str]) -> None:
    """Serves until the other end of ``control`` is closed. Says first ``ready``, or why not.

    ``folder``: an empty one, for a root to be built at."""
    requests = socket.socket(fileno=control)
    os.umask(0o022)  # what is built for programs must be open to them
    sys.path[:] = [path for path in sys.path if path] + packages
    for name in PRELOADED:
        importlib.import_module(name)
    paths = confine.readable(packages)
    nothing = os.open("/dev/null", os.O_RDWR)
    try:
        if way == "namespaces":
            confine.enter_namespaces(folder, paths)
        elif way == "landlock" and not kernel.landlock_version():
            raise OSError("the kernel has no Landlock")
    except OSError as error:
        requests.send(f"{way}: {error}".encode())
        return
    for standard in range(3):
        os.dup2(nothing, standard)
    requests.send(b"ready")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    while True:
        text, files, _, _ = socket.recv_fds(requests, 4096, FILES)
        if not text:
            return
        try:
            watcher = os.fork()
        except OSError as error:  # no more processes: this one is not begun, others may be
            os.write(files[0], f"failed: {error}".encode())
            watcher = 1
        if watcher == 0:
            _watch(requests, nothing, way, paths, json.loads(text), files)
        for file in files:
            os.close(file)


def _watch(requests: socket.socket, nothing: int, way: str, paths: list[str], request: dict, files: list[int]) -> None:
    """Forks the program, ends it, and tells how it ended: ``exit 0``, ``signal 9``, ``time``, or ``failed: why``."""
    told, code = files[0], 0
    try:
        kernel.die_with_parent()
        requests.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        limits = Limits(**request["limits"])
        deadline = time.monotonic() + limits.seconds
        if way == "namespaces":
            kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
        ready, begun = os.pipe()
        program = os.fork()
        if program == 0:
            _program(request["role"], nothing, way, paths, limits, files[1:], begun)
        os.close(begun)
        for file in files[1:]:
            os.close(file)
        wrong = b"".join(iter(lambda: os.read(ready, 4096), b"")).decode()
        os.write(told, (f"failed: {wrong}" if wrong else _ended(program, told, deadline, way)).encode())
    except BaseException:
        code = 1
        os.write(told, f"failed: {traceback.format_exc()}".encode()[-4000:])
    finally:
        os._exit(code)


def _ended(program: int, told: int, deadline: float, way: str) -> str:
    """Waits for the program's end, its time, or for the one who asked to let go; ends it, and all that it began."""
    handle = os.pidfd_open(program)
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    waiting.register(told, select.POLLHUP | select.POLLIN)
    events = waiting.poll(max(0.0, deadline - time.monotonic()) * 1000)
    late = not any(file == handle for file, _ in events)
    if way == "none":
        _quietly(lambda: os.killpg(program, signal.SIGKILL))
    if late:
        _quietly(lambda: os.kill(program, signal.SIGKILL))
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    return "time" if late else f"exit {status}" if status >= 0 else f"signal {-status}"


def _quietly(call: Callable[[], None]) -> None:
    try:
        call()
    except OSError:
        pass


def _program(role: str, nothing: int, way: str, paths: list[str], limits: Limits, files: list[int], begun: int) -> None:
    """Confines this process and runs a role in it. What goes wrong before is written to ``begun``."""
    try:
        kernel.die_with_parent()
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # where the roles look for them: 3 the text, 4 the channel or output, 5 what else; none of the server's stays
        high = [os.dup2(file, 100 + i) for i, file in enumerate([*files, begun])]
        standard = [os.dup2(nothing, number) for number in range(3)]
        for number, file in enumerate(high, len(standard)):
            os.dup2(file, number)
        last = len(standard) + len(high)
        os.closerange(last, MOST_FILES)
        begun = last - 1
        os.set_inheritable(begun, False)
        confine.begin_randomness()
        confine.confine(way, limits, paths)
        os.close(begun)
    except BaseException:
        os.write(begun, traceback.format_exc().encode()[-3000:])
        os._exit(1)
    try:
        ROLES[role]([*range(3, last - 1)])
    except BaseException:
        os._exit(1)
    os._exit(0)
