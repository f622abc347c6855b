"""Which system calls a program may make: those of this list, and no other.

There is none that begins a process, runs a file, opens a socket to anywhere, touches another process, changes modes,
owners or mounts, or asks the kernel for memory that no limit counts. What is refused gives EPERM.
"""

import errno
import platform
import struct

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16

# name: (x86_64, aarch64)
_CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101),
    "getitimer": (36, 102), "setitimer": (38, 103), "getpid": (39, 172), "recvfrom": (45, 207), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209), "exit": (60, 93), "wait4": (61, 260),
    "uname": (63, 160), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "getgroups": (115, 158),
    "getpgid": (121, 155), "getsid": (124, 156), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "gettid": (186, 178), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_ctl": (233, 21),
    "waitid": (247, 95), "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59),
    "getcpu": (309, 168), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
    "close_range": (436, 436), "faccessat2": (439, 439),
}  # fmt: skip
_CALLS_OF_X86 = {
    "stat": 4, "lstat": 6, "poll": 7, "access": 21, "pipe": 22, "select": 23, "dup2": 33, "pause": 34, "alarm": 37,
    "getdents": 78, "readlink": 89, "getpgrp": 111, "arch_prctl": 158, "time": 201, "epoll_create": 213,
    "epoll_wait": 232,
}  # fmt: skip
_CHANGING_FILES = {"mkdirat": (258, 34), "unlinkat": (263, 35), "renameat": (264, 38), "renameat2": (316, 276)}
_CHANGING_FILES_OF_X86 = {"rename": 82, "mkdir": 83, "rmdir": 84, "unlink": 87}
# looked at closer below
_OPEN, _OPENAT, _CLONE, _CLONE3 = 2, (257, 56), (56, 220), (435, 435)
_KILL_CALL, _TGKILL, _IOCTL, _PRCTL = (62, 129), (234, 131), (16, 29), (157, 167)
_PRLIMIT, _SOCKETPAIR, _SENDTO, _FCNTL = (302, 261), (53, 199), (44, 206), (72, 25)

_WRITING = 0x1 | 0x2 | 0x40 | 0x200 | 0x400000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, and the bit of O_TMPFILE
_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020000
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # F_DUPFD to F_SETLKW; not F_SETOWN, by which the kernel signals others
_PR_SET_NAME, _PR_GET_NAME, _AF_UNIX = 15, 16, 1


def program(pid: int, files: bool, threads: bool) -> bytes:
    """The filter of a process.

    Args:
      pid: its number, to which alone it may send signals.
      files: whether it may write files.
      threads: whether it may begin threads.
    """
    machine = ("x86_64", "aarch64").index(platform.machine())
    allowed = [numbers[machine] for numbers in (_CALLS | (_CHANGING_FILES if files else {})).values()]
    if machine == 0:
        allowed += (_CALLS_OF_X86 | (_CHANGING_FILES_OF_X86 if files else {})).values()
    code = [_load(_ARCH), _jump(_EQUAL, _ARCHITECTURE[platform.machine()], 1, 0), _give(_KILL), _load(_NUMBER)]
    for number in allowed:
        code += [_jump(_EQUAL, number, 0, 1), _give(_ALLOW)]
    reading = [] if files else [(1, _ANY_BIT, (_WRITING,), False)]
    closer = {
        _CLONE[machine]: [(0, _ANY_BIT, (_CLONE_NEW,), False), (0, _ANY_BIT, (_CLONE_THREAD,), True)],
        _KILL_CALL[machine]: [(0, _EQUAL, (pid,), True)],
        _TGKILL[machine]: [(0, _EQUAL, (pid,), True)],
        _IOCTL[machine]: [(1, _EQUAL, _IOCTLS, True)],
        _FCNTL[machine]: [(1, _EQUAL, _FCNTLS, True)],
        _PRCTL[machine]: [(0, _EQUAL, (_PR_SET_NAME, _PR_GET_NAME), True)],
        _PRLIMIT[machine]: [(0, _EQUAL, (0,), True)],
        _SOCKETPAIR[machine]: [(0, _EQUAL, (_AF_UNIX,), True)],
        # to no other address than the other end's: both halves of the pointer are zero
        _SENDTO[machine]: [(4, _EQUAL, (0,), True), (4.5, _EQUAL, (0,), True)],
        _OPENAT[machine]: [(argument + 1, *rest) for argument, *rest in reading],
    }
    if machine == 0:
        closer[_OPEN] = reading
    if not threads:
        del closer[_CLONE[machine]]
    for number, checks in closer.items():
        block = [part for check in checks for part in _check(*check)]
        code += [_jump(_EQUAL, number, 0, len(block) + 1), *block, _give(_ALLOW)]
    # the C library then takes clone, whose arguments can be seen
    code += [_jump(_EQUAL, _CLONE3[machine], 0, 1), _give(_REFUSE | errno.ENOSYS), _give(_REFUSE | errno.EPERM)]
    return b"".join(code)


def _check(argument: float, test: int, values: tuple[int, ...], wanted: bool) -> list[bytes]:
    """Refuses unless the low half (of 4.5: the high half of the fourth) of an argument passes a test with one of some
    values, or where it is not ``wanted``, fails it with the only one. The number of the call is loaded again after."""
    tests = []
    for i, value in enumerate(values):
        over = len(values) - i  # the tests to come, and the refusal
        tests.append(_jump(test, value, over, 0) if wanted else _jump(test, value, 0, over))
    where = _ARGUMENTS + int(argument * 8)
    return [_load(where), *tests, _give(_REFUSE | errno.EPERM), _load(_NUMBER)]


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", _LOAD, 0, 0, offset)


def _jump(test: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", test, if_true, if_false, value & 0xFFFFFFFF)


def _give(action: int) -> bytes:
    return struct.pack("=HBBI", _RETURN, 0, 0, action)
