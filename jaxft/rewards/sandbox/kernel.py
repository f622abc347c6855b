"""System calls that Python 3.11 has no functions for. All raise OSError.

Numbers are the same on every architecture for calls since 2019, and given for x86_64 and aarch64 otherwise.
"""

import ctypes
import os
import platform
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CAPABILITIES_V3 = 0x20080522
_LANDLOCK = {"create": 444, "add": 445, "restrict": 446}


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leaves namespaces for new ones."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    encoded = None if kind is None else kind.encode()
    result = _libc.mount(source.encode(), target.encode(), encoded, ctypes.c_ulong(flags), options.encode() or None)
    _checked(result, f"mount {target}")


def read_only(path: str, recursive: bool = True) -> None:
    """Makes a mount, and those below it, read-only, without devices and set-uid programs."""
    attributes = struct.pack("=4Q", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(442, _AT_FDCWD, path.encode(), flags, attributes, ctypes.c_size_t(len(attributes)))
    _checked(result, f"mount_setattr {path}")


def pivot_root_here() -> None:
    """Makes the working directory, which is a mount, the root, and lets go of the old one."""
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    _checked(_libc.syscall(number, b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def _prctl(option: int, value: int, pointer: bytes | None = None) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), pointer or zero, zero, zero), f"prctl {option}")


def die_with_parent() -> None:
    """SIGKILL when the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def be_dumpable() -> None:
    """Lets a process that has changed its user own its files in /proc again."""
    _prctl(_PR_SET_DUMPABLE, 1)


def no_new_privileges() -> None:
    """No program that is executed from now on gains any."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """All of them, for good."""
    header, none = struct.pack("=Ii", _CAPABILITIES_V3, 0), bytes(24)
    _checked(_libc.capset(header, none), "capset")


def filter_calls(program: bytes) -> None:
    """Installs a seccomp filter; ``program``: BPF instructions of 8 bytes each."""
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, 2, described)


def landlock_version() -> int:
    """Version of Landlock; 0 where the kernel has none."""
    return max(0, _libc.syscall(_LANDLOCK["create"], None, ctypes.c_size_t(0), 1))


def landlock(readable: list[str], version: int) -> None:
    """Lets this process read files in and below some paths, and do nothing else with any file."""
    access = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("=3Q", access, network, scopes)
    size = ctypes.c_size_t(8 if version < 4 else 16 if version < 6 else 24)
    rules = _checked(_libc.syscall(_LANDLOCK["create"], attributes, size, 0), "landlock_create_ruleset")
    for path in readable:
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        read = 1 << 2 | (1 << 3 | 1 if os.path.isdir(path) else 0)  # files; directories, and executing
        rule = struct.pack("=Qi", read, at)
        _checked(_libc.syscall(_LANDLOCK["add"], rules, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(at)
    _checked(_libc.syscall(_LANDLOCK["restrict"], rules, 0), "landlock_restrict_self")
    os.close(rules)
