"""Takes from a process what it could do harm with: once for the server, and the rest for each program.

Two ways, of which the first that the kernel allows is taken:

- ``namespaces``: the server has users, network, mounts and messages of its own; its root holds Python and nothing else,
  read-only. Each program has process numbers of its own, and a file system in memory to write in.
- ``landlock``: a program may read Python's files and no others, and write none.

In both a seccomp filter (`seccomp`) allows a list of system calls, with no way to begin a process or reach a network,
and rlimits bound what is left.
"""

import contextlib
import os
import random
import resource
import sys
import sysconfig
from typing import Any, NamedTuple

from . import kernel, seccomp

NOBODY = 65534
WORK = "/tmp"


class Limits(NamedTuple):
    """What a program may use."""

    seconds: float
    """Of wall time; of a processor, this rounded up and one more."""
    memory: int
    """Bytes of address space."""
    disk: int
    """Bytes that its files may have together."""


def readable(packages: list[str]) -> list[str]:
    """What a program may read: Python, the system's shared libraries, and ``packages``."""
    paths = sysconfig.get_paths()
    wanted = [paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib"), *packages]
    wanted += ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/dev/null"]
    real = sorted({os.path.realpath(path) for path in wanted if os.path.exists(path)})
    return [path for path in real if not any(path.startswith(other + "/") for other in real if other != path)]


def enter_namespaces(folder: str, paths: list[str]) -> None:
    """Makes this process live in namespaces of its own, with ``paths`` at ``folder`` as its root. Raises OSError."""
    others = kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    user, group = os.getuid(), os.getgid()
    own = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # the first to go if memory runs out
        _write(own, "oom_score_adj", "1000")
    if user == 0:  # while what Python is in can still be read, which may be root's own
        kernel.unshare(kernel.CLONE_NEWNS)
        _enter_root(folder, paths)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.be_dumpable()
        user = group = NOBODY
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | others)
        _map_user(own, user, group)
    else:
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | others)
        _map_user(own, user, group)
        _enter_root(folder, paths)
    os.close(own)


def _map_user(own: int, user: int, group: int) -> None:
    _write(own, "setgroups", "deny")
    _write(own, "uid_map", f"{user} {user} 1")
    _write(own, "gid_map", f"{group} {group} 1")


def _write(folder: int, name: str, text: str) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _enter_root(folder: str, paths: list[str]) -> None:
    """A root that holds some paths of the old one, and nothing can be written to."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=0755")
    for path in paths:
        inside = folder + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
        kernel.mount(path, inside, None, kernel.MS_BIND | kernel.MS_REC)
        if not path.startswith("/dev/"):
            kernel.read_only(inside)
    for link in ("/lib", "/lib64"):
        if os.path.islink(link) and not os.path.lexists(folder + link):
            os.symlink(os.readlink(link), folder + link)
    os.makedirs(folder + WORK, exist_ok=True)
    os.chdir(folder)
    kernel.pivot_root_here()
    kernel.read_only("/", recursive=False)


def confine(way: str, limits: Limits, paths: list[str]) -> None:
    """The last thing that is done in a process before it runs a program. Raises OSError."""
    os.environ.clear()
    if way == "namespaces":
        kernel.mount("tmpfs", WORK, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size={limits.disk},mode=0700")
        os.chdir(WORK)
    else:
        os.chdir("/" if way == "landlock" else WORK)
    _limit(limits, way)
    if way == "none":
        return
    kernel.drop_capabilities()
    kernel.no_new_privileges()
    if way == "landlock":
        kernel.landlock(paths, kernel.landlock_version())
    private = way == "namespaces"
    kernel.filter_calls(seccomp.program(os.getpid(), files=private, threads=private))


def _limit(limits: Limits, way: str) -> None:
    seconds = int(limits.seconds) + 2
    bounds: dict[Any, int] = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: limits.memory,
        resource.RLIMIT_FSIZE: limits.disk,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if way == "namespaces":  # elsewhere the user's own processes count too
        bounds[resource.RLIMIT_NPROC] = 1024
    for which, bound in bounds.items():
        hard = resource.getrlimit(which)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(which, (bound, bound))


def begin_randomness() -> None:
    """The same numbers for every program, so that a verdict is the same when it is asked for again."""
    random.seed(0)
