"""What the TPU compiler plans for a step: its memory and its program, without the machine code.

Writing machine code is nine tenths of the compiler's time and changes neither, so it is done in a process of its own
that ends once the plan is on disk. The sizes are those of `Compiled.memory_analysis`, to the byte.
"""

import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# in the order in which they are written
REPORT = "*.after_optimizations-memory-usage-report.txt"
BUFFERS = "*.after_optimizations-buffer-assignment.txt"
PROGRAM = "*.after_optimizations_after_buffer_assignment.txt"

CHIP, HOST = "0", "5"  # memory spaces, as in a layout's S(5)


class Plan(NamedTuple):
    """Bytes of arguments, results and temporaries, on each chip and, of its share, on the host; of the arguments, of
    the results and of what is both, a buffer that is used again; and the program."""

    chip: int
    host: int
    arguments: int
    results: int
    aliased: int
    program: str


def plan(lower: Callable[..., Any], *args: Any, folder: Path, seconds: int = 600) -> Plan:
    """The plan for ``lower(*args)``, a function of a module and what it needs, both to be pickled.

    Raises RuntimeError where the compiler refuses."""
    child = multiprocessing.get_context("spawn").Process(target=_compile, args=(lower, args, folder))
    child.start()
    try:
        end = time.monotonic() + seconds
        while not any(folder.glob(PROGRAM)):
            if not child.is_alive() or time.monotonic() > end:
                raise RuntimeError(f"no plan in {folder}: the compiler ended with {child.exitcode}; see its output")
            time.sleep(0.1)
        return read(folder)
    finally:
        child.kill()
        child.join()


def dumped(folder: Path) -> dict[str, Any]:
    """Compiler options with which `read` finds what it reads in a folder."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def read(folder: Path) -> Plan:
    """The plan of the one program compiled with `dumped(folder)`, complete or still being written."""
    (report,), (buffers,), (program,) = (folder.glob(pattern) for pattern in (REPORT, BUFFERS, PROGRAM))
    while not (text := program.read_text()).rstrip().endswith("}"):
        time.sleep(0.1)
    spaces = dict(re.findall(r"\(color=(\d+)\)\nTotal bytes: (\d+)", report.read_text()))
    return Plan(int(spaces[CHIP]), int(spaces.get(HOST, 0)), *_shares(buffers.read_text()), text)


def _shares(buffers: str) -> tuple[int, int, int]:
    """Bytes of the arguments, of the results, and of what is both."""
    found = re.findall(r"^allocation \d+: size (\d+), (.*)", buffers, re.MULTILINE)
    kinds = [(int(size), " parameter " in kind, "maybe-live-out" in kind) for size, kind in found]
    given, left = (sum(size for size, *is_ in kinds if is_[i]) for i in (0, 1))
    return given, left, sum(size for size, *is_ in kinds if all(is_))


def _compile(lower: Callable[..., Any], args: tuple, folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # it would not plan again what it has compiled
    lower(*args).compile(compiler_options=dumped(folder))
