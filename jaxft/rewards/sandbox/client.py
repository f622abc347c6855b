"""Runs programs in the sandbox, and tells what became of them. Threads may call at once."""

import contextlib
import functools
import json
import os
import platform
import select
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Isolation = Literal["auto", "namespaces", "landlock", "none-i-accept-the-risk"]
OUTPUT = 4 << 20
"""Bytes that a program may print."""
GRACE = 10.0
"""Seconds past a program's time in which the sandbox must have said how it ended."""
_PYTHON_NEEDS = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""Of the environment, what a Python that is installed in an odd place does not begin without; programs see none."""
_BOOT = (
    "import sys, types; package = types.ModuleType('sandbox'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['sandbox'] = package; from sandbox import server; "
    "server.main(int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])"
)


class SandboxError(RuntimeError):
    """The sandbox cannot be had or has failed, or tests are wrong: nothing is said of the program."""


class Limits(NamedTuple):
    """What a program, and its tests, may each use."""

    seconds: float = 10.0
    memory: int = 512 << 20
    """Bytes of address space."""
    disk: int = 16 << 20
    """Bytes of files."""


class Examined(NamedTuple):
    """What tests say of a program."""

    passed: list[bool]
    """Of each test."""
    problem: str
    """What the first that failed says; empty if none did."""


class Ran(NamedTuple):
    """What a script did."""

    output: str
    ended: str
    """``exit 0``, ``signal 9``, ``time``, or ``output`` for too much of it."""


class Server:
    """The process that programs are forked from."""

    def __init__(self, way: str, packages: bool) -> None:
        """``way``: namespaces, landlock or none. Raises SandboxError where the kernel does not allow it."""
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise SandboxError(f"{sys.platform} on {platform.machine()}: expected Linux on x86_64 or aarch64")
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = sysconfig.get_paths()
        libraries = [*dict.fromkeys([paths["purelib"], paths["platlib"]])] if packages else []
        with tempfile.TemporaryDirectory(prefix="jaxft-sandbox-", ignore_cleanup_errors=True) as folder, theirs:
            needs = {name: os.environ[name] for name in _PYTHON_NEEDS if name in os.environ}
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", _BOOT, str(Path(__file__).parent),
                 str(theirs.fileno()), way, folder, *libraries],
                env={"PYTHONHASHSEED": "0"} | needs, cwd="/", pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            theirs.close()
            said = ours.recv(4096).decode()
        if said != "ready":
            ours.close()
            told = self._process.communicate()[1].decode().strip()
            raise SandboxError(said or told or "the sandbox's server does not begin")
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._requests = ours
        self._close = weakref.finalize(self, _closed, ours, self._process)

    def begin(self, role: str, limits: Limits, files: Sequence[int]) -> socket.socket:
        """Begins a process; what comes back tells how it ended, and ends it when closed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"role": role, "limits": limits._asdict()}).encode()
        try:
            with theirs, self._lock:
                socket.send_fds(self._requests, [request], [theirs.fileno(), *files])
        except OSError as error:
            ours.close()
            raise SandboxError(f"the sandbox's server has ended ({error})") from None
        return ours

    def close(self) -> None:
        """Ends it, and every program."""
        self._close()

    @property
    def alive(self) -> bool:
        """Whether it still is there."""
        return self._process.poll() is None


def _closed(requests: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    requests.close()
    process.wait()


def examine(
    server: Server, program: str, tests: Sequence[str], limits: Limits, entry_point: str | None = None
) -> Examined:
    """What tests say of a program. Raises SandboxError, also for tests that cannot be run or never use the program."""
    with contextlib.ExitStack() as stack:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        verdict, told = os.pipe()
        stack.callback(os.close, verdict)
        asked = json.dumps({"tests": list(tests), "entry_point": entry_point})
        with here, there, _held(program) as text, _held(asked) as questions, os.fdopen(told, "wb") as told_:
            subject = server.begin("functions", limits, [text, here.fileno()])
            stack.callback(subject.close)
            examiner = server.begin("examiner", limits, [questions, there.fileno(), told_.fileno()])
            stack.callback(examiner.close)
        said, _ = _read(verdict, OUTPUT, limits.seconds + GRACE)
        # what is left of an incomplete last line is no verdict
        lines = [json.loads(line) for line in said.decode(errors="replace").split("\n")[:-1]]
        if not any("ready" in line for line in lines):
            raise SandboxError(f"tests cannot be begun: {_end(examiner, limits)}")
        done = next((line for line in lines if "done" in line), None)
        # an examiner that ends before its time was ended by what it was told, or by the tests: they are not passed
        ended = "" if done else _end(examiner, limits)
        if done and not done["calls"] and "the program has ended" in done.get("problem", ""):
            _end(subject, limits)
    if faults := [line["fault"] for line in lines if "fault" in line]:
        raise SandboxError(f"the tests cannot be run: {faults[0]}")
    passed = [False] * len(tests)
    problems = [str(line["problem"]) for line in lines if "problem" in line]
    for line in lines:
        if "test" in line:
            passed[line["test"]] = line["passed"]
    if done and all(passed) and not done["calls"]:
        raise SandboxError("the tests never use the program, so that any would pass them")
    unfinished = {"time": f"no answer within {limits.seconds:g} s"}.get(ended, f"the tests were ended by {ended}")
    return Examined(passed, "" if all(passed) else problems[0] if problems else unfinished)


def run(server: Server, program: str, given: str, limits: Limits) -> Ran:
    """What a script prints, given an input. Raises SandboxError."""
    output, told = os.pipe()
    try:
        with _held(program) as text, _held(given) as asked, os.fdopen(told, "wb") as told_:
            ours = server.begin("script", limits, [text, told_.fileno(), asked])
        with ours:
            said, whole = _read(output, OUTPUT, limits.seconds + GRACE)
            ended = _end(ours, limits) if whole else "output"
    finally:
        os.close(output)
    return Ran(said.decode(errors="replace"), ended)


def _read(file: int, most: int, seconds: float) -> tuple[bytes, bool]:
    """What comes until the end, or too much of it, or too late; and whether that was all."""
    found, deadline = bytearray(), time.monotonic() + seconds
    while len(found) <= most:
        if not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return bytes(found), False
        part = os.read(file, 1 << 16)
        if not part:
            return bytes(found), True
        found += part
    return bytes(found[:most]), False


def _end(told: socket.socket, limits: Limits) -> str:
    """How a process ended. Raises SandboxError where it was never begun."""
    told.settimeout(limits.seconds + GRACE)
    try:
        said = told.recv(8192).decode()
    except TimeoutError:
        raise SandboxError("the sandbox does not say how a program ended") from None
    if not said or said.startswith("failed"):
        raise SandboxError(f"a program could not be begun: {said.removeprefix('failed: ')}".strip(": "))
    return said


@contextlib.contextmanager
def _held(text: str):
    """A file in memory that holds a text, to be read from its beginning."""
    file = os.memfd_create("text", os.MFD_CLOEXEC)
    try:
        data = text.encode(errors="surrogatepass")
        while data:
            data = data[os.write(file, data) :]
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


PROBE = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def open_it(path, flags):
    os.close(os.open(path, flags))
tries = {
    "read /etc/passwd": lambda: open_it("/etc/passwd", os.O_RDONLY),
    "read /proc": lambda: open_it(f"/proc/{os.getppid()}/environ", os.O_RDONLY),
    "write outside of its folder": lambda: open_it("/var/tmp/probe", os.O_CREAT | os.O_WRONLY),
    "open a socket": lambda: socket.socket(),
    "begin a process": lambda: os.waitpid(os.fork() or os._exit(0), 0),
    "signal another process": lambda: os.kill(os.getppid() or 2, 0),
    "trace": lambda: libc.ptrace(0, 0, 0, 0) < 0 and 1 / 0,
}
for name, attempt in tries.items():
    try:
        attempt()
    except (OSError, ZeroDivisionError):
        continue
    print(name)
print("done")
"""


@functools.cache
def _started(isolation: Isolation, packages: bool, number: int) -> Server:
    del number
    if isolation == "none-i-accept-the-risk":
        return Server("none", packages)
    problems = []
    for way in ("namespaces", "landlock") if isolation == "auto" else (isolation,):
        try:
            server = Server(way, packages)
        except SandboxError as error:
            problems.append(str(error))
            continue
        found = run(server, PROBE, "", Limits())
        if found.output.split("\n") == ["done", ""]:
            return server
        server.close()
        could = ", ".join(found.output.strip().split("\n")[:-1])
        problems.append(f"{way}: a program could {could}" if could else f"{way}: the probe ended by {found.ended}")
    raise SandboxError(
        f"isolation: got {isolation}, and this kernel keeps no program from doing harm ({'; '.join(problems)}). Allow "
        "user namespaces or Landlock to this process; or, where nothing can be lost, as in a container that holds "
        "nothing else: isolation: none-i-accept-the-risk"
    )


_starting, _restarts = threading.Lock(), [0]


def server(isolation: Isolation = "auto", packages: bool = False) -> Server:
    """The server, begun when it is first asked for and again if it has ended. Raises SandboxError where the kernel
    isolates nothing, unless ``isolation`` accepts that. ``packages``: whether programs see the packages installed."""
    with _starting:
        found = _started(isolation, packages, _restarts[0])
        if not found.alive:
            _restarts[0] += 1
            found = _started(isolation, packages, _restarts[0])
        return found
