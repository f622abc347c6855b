"""Programs that must pass tests: 1 for a completion whose Python code passes all of its row's tests, 0 for others.

Tests are a list of statements such as ``assert f(1) == 2``, a program (of asserts, of functions test_..., of unittest's
cases, or that defines ``check(candidate)``), or a list of ``{input: ..., output: ...}`` for programs that read and
print. They run in `sandbox`, apart from the program, which learns neither them nor the verdict.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from jaxft.border.errors import ConfigError
from jaxft.rewards import answers, settings
from jaxft.rewards.sandbox import client
from jaxft.rewards.sandbox.client import Isolation, Limits, SandboxError
from jaxft.rewards.settings import Final, Function, Weighted


@dataclass(frozen=True, kw_only=True)
class Code(Final, Weighted):
    """Whether a program passes its tests. The program is the last ```python block of the final answer, or all of it."""

    tests: str = "tests"
    """Column of the tests: a list of statements, a program, or a list of {input, output}. A row without them has no
    reward."""
    setup: str | None = None
    """Column of statements that are run before the tests, such as imports."""
    entry_point: str | None = None
    """Column of the name of a function, which is given to the tests' function check."""
    score: Literal["all", "fraction"] = "all"
    """all: 1 if every test passes; fraction: the share of them that do."""
    seconds: float = 10.0
    """Time for all tests of one program, or for one input."""
    memory_mb: int = 512
    """Memory of a program, and of its tests."""
    disk_mb: int = 16
    """Space for a program's files, which are in memory too, and gone with it."""
    workers: int | None = None
    """Programs that run at once. Default: one for each processor."""
    packages: bool = False
    """Whether programs and tests may import the packages that are installed beside jaxft, not only Python's own."""
    isolation: Isolation = "auto"
    """What keeps programs from doing harm: namespaces, or Landlock; auto: the first of them that the kernel allows, and
    no run without. none-i-accept-the-risk: only limits of time and memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seconds > 0:
            raise ValueError(f"seconds: got {self.seconds}; expected a number above 0")
        for name, least in (("memory_mb", 64), ("disk_mb", 1), ("workers", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: got {value}; expected at least {least}")


_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def program(text: str) -> str:
    """The last block of Python in an answer, or else its last block of no language, or else all of it."""
    blocks = _BLOCK.findall(text)
    python = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    bare = [code for language, code in blocks if not language]
    return (python or bare or [text])[-1]


def make(config: Code) -> Function:
    """What each completion's program scores; None where the row has no tests; an exception that says why where the
    tests cannot be run. Raises ConfigError where the kernel isolates nothing."""
    try:
        client.server(config.isolation, config.packages)
    except SandboxError as error:
        raise ConfigError(f"`rewards.code`: {error}") from None
    limits = Limits(config.seconds, config.memory_mb << 20, config.disk_mb << 20)
    pool = ThreadPoolExecutor(config.workers or os.cpu_count() or 1, thread_name_prefix="code")

    def judged(text: str, tests: Any, setup: Any, entry_point: Any) -> tuple[float | Exception | None, str]:
        if tests is None:
            return None, ""
        final = answers.parts(text, config.tags)[1]
        if not final:
            return 0.0, "no final answer"
        try:
            passed, problem = _passed(config, program(final), tests, setup, entry_point, limits)
        except (SandboxError, ValueError) as error:
            return error, ""
        share = sum(passed) / len(passed)
        return share if config.score == "fraction" else float(share == 1), problem

    def code(
        prompts: Sequence[Any], completions: Sequence[str], log_extra: Any = None, **columns: Sequence[Any]
    ) -> list[float | Exception | None]:
        del prompts
        nothing = [None] * len(completions)
        named = [("tests", config.tests), ("setup", config.setup), ("entry_point", config.entry_point)]
        rows = [nothing if name is None else settings.column(columns, name, key) for key, name in named]
        asked = [*zip(completions, *rows, strict=True)]
        once = {repr(one): one for one in asked}  # of the same programs one is run
        found = dict(zip(once, pool.map(lambda one: judged(*one), once.values()), strict=True))
        said = [found[repr(one)] for one in asked]
        if log_extra is not None:
            log_extra("code_problem", [problem for _, problem in said])
        return [value for value, _ in said]

    return code


def _passed(
    config: Code, text: str, tests: Any, setup: Any, entry_point: Any, limits: Limits
) -> tuple[list[bool], str]:
    """Of each test whether a program passes it, and what went wrong first. Raises SandboxError, ValueError."""
    server = client.server(config.isolation, config.packages)
    listed = [tests] if isinstance(tests, str) else tests
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(f"tests: the row has {tests!r}; expected a list, or a program")
    if all(isinstance(test, str) for test in listed):
        before = [str(setup)] if setup else []
        examined = client.examine(server, text, [*before, *listed], limits, entry_point)
        if not all(examined.passed[: len(before)]):
            return [False] * len(listed), examined.problem
        return examined.passed[len(before) :], examined.problem
    passed, problem = list[bool](), ""
    for test in listed:
        if not isinstance(test, dict) or not {"input", "output"} <= test.keys():
            raise ValueError(f"tests: the row has {test!r}; expected statements, or mappings of input and output")
        ran = client.run(server, text, str(test["input"]), limits)
        passed.append(ran.ended == "exit 0" and _printed(ran.output) == _printed(str(test["output"])))
        problem = problem or ("" if passed[-1] else f"{ran.ended}, printed {ran.output[:200]!r}")
    return passed, problem


def _printed(text: str) -> list[str]:
    """What is compared of an output: its lines, but for white space at their ends and empty lines at its end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
