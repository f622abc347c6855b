"""What the TPU compiler plans for a step: its memory and its program, without the machine code.

Writing machine code is nine tenths of the compiler's time and changes neither, so it is done in a process of its own
that ends once the plan is on disk.
"""

import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

REPORT, PROGRAM = "*.after_optimizations-memory-usage-report.txt", "*.after_optimizations_after_buffer_assignment.txt"

CHIP, HOST = "0", "5"  # memory spaces, as in a layout's S(5)


class Plan(NamedTuple):
    """Bytes of arguments, results and temporaries, on each chip and, of its share, on the host; and the program."""

    chip: int
    host: int
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
        (report,), (program,) = folder.glob(REPORT), folder.glob(PROGRAM)
        while not (text := program.read_text()).rstrip().endswith("}"):  # being written
            time.sleep(0.1)
    finally:
        child.kill()
        child.join()
    spaces = dict(re.findall(r"\(color=(\d+)\)\nTotal bytes: (\d+)", report.read_text()))
    return Plan(int(spaces[CHIP]), int(spaces.get(HOST, 0)), text)


def _compile(lower: Callable[..., Any], args: tuple, folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # it would not plan again what it has compiled
    lower(*args).compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
