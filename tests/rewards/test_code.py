"""Programs and their tests: what tests may ask of a program across two processes, and what is a test's own fault."""

import textwrap

import pytest

from jaxft import rewards
from jaxft.border.errors import ConfigError
from jaxft.rewards import REWARDS, Code, code
from jaxft.rewards.sandbox import client
from jaxft.rewards.sandbox.client import Limits, SandboxError

LIMITS = Limits(seconds=30.0)


@pytest.fixture(scope="module")
def server():
    try:
        return client.server("auto")
    except SandboxError as error:
        pytest.skip(str(error))


def examine(server, program, *tests, entry_point=None):
    tests = [textwrap.dedent(test) for test in tests]
    return client.examine(server, textwrap.dedent(program), tests, LIMITS, entry_point)


PROGRAM = """
import collections, datetime, decimal, fractions, math, enum
from dataclasses import dataclass

LIMIT = 10
class Wrong(ValueError): pass
Point = collections.namedtuple("Point", "x y")
class Colour(enum.IntEnum):
    RED = 3
class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self):
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __iter__(self):
        return iter(self.items)
    def __getitem__(self, index):
        return self.items[index]
    def __eq__(self, other):
        return isinstance(other, Stack) and self.items == other.items
    def __add__(self, other):
        return Stack(self.items + other.items)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.items.clear()
@dataclass(frozen=True)
class Node:
    value: int
    next: object = None
def same(x): return x
def values():
    return {
        "none": None, "big": 3 ** 200, "float": 0.1, "inf": float("-inf"), "text": "\\u00fc\\ud800", "bytes": b"\\x00a",
        "tuple": (1, (2,)), "set": {1, 2}, "frozen": frozenset("a"), 3: [True, 1.0], "range": range(3),
        "complex": 1 + 2j, "decimal": decimal.Decimal("1.10"), "fraction": fractions.Fraction(1, 3),
        "date": datetime.date(2024, 2, 29), "delta": datetime.timedelta(1), "deque": collections.deque([1]),
        "counter": collections.Counter("aab"), "point": Point(1, 2), "enum": Colour.RED,
    }
def fail(x): raise Wrong(f"got {x}")
def missing(): return {}["key"]
def sort(items): items.sort()
def apply(function, *args, **named): return function(*args, **named)
def count():
    yield from (1, 2, 3)
def say(x): print("said", x)
def chain(): return Node(1, Node(2))
async def later(x): return x
"""
FINE = [
    "assert same(5) == 5 and same('a') == 'a' and same([1, {'a': (2, None)}]) == [1, {'a': (2, None)}]",
    """
    import collections, datetime, decimal, fractions
    found = values()
    assert found["big"] == 3 ** 200 and type(found["float"]) is float and found["inf"] == float("-inf")
    assert found["text"] == "\\u00fc\\ud800" and found["bytes"] == b"\\x00a" and found["tuple"] == (1, (2,))
    assert found["set"] == {1, 2} and found["frozen"] == frozenset("a") and found[3] == [True, 1.0]
    assert type(found[3][0]) is bool and type(found[3][1]) is float and found["range"] == range(3)
    assert found["complex"] == 1 + 2j and found["decimal"] == decimal.Decimal("1.10")
    assert found["fraction"] == fractions.Fraction(1, 3) and found["date"] == datetime.date(2024, 2, 29)
    assert found["delta"] == datetime.timedelta(1) and found["deque"] == collections.deque([1])
    assert found["counter"]["a"] == 2 and found["counter"]["z"] == 0 and found["point"] == (1, 2)
    assert found["point"].y == 2 and found["enum"] == 3 and found["none"] is None
    """,
    "assert LIMIT == 10",
    "assert math.isclose(same(0.1) + 0.2, 0.3)",
    """
    stack = Stack([1])
    stack.push(2).push([3])
    assert len(stack) == 3 and stack.pop() == [3] and stack[0] == 1 and list(stack) == [1, 2] and 2 in stack
    assert stack.items == [1, 2] and isinstance(stack, Stack) and not isinstance(3, Stack)
    assert stack == Stack([1, 2]) and stack != Stack([1]) and (stack + Stack([3])).items == [1, 2, 3]
    stack.items = [7]
    with stack as held:
        assert held.pop() == 7
        stack.push(1)
    assert len(stack) == 0 and not stack
    """,
    """
    try:
        fail(3)
    except Wrong as error:
        assert str(error) == "got 3" and isinstance(error, ValueError)
    else:
        assert False
    try:
        missing()
    except KeyError:
        pass
    """,
    "items = [3, 1, 2]\nsort(items)\nassert items == [1, 2, 3]",
    "assert apply(lambda x, y: x + y, 1, y=2) == 3 and apply(sorted, [2, 1]) == [1, 2] and apply(same, 4) == 4",
    "assert list(count()) == [1, 2, 3] and next(count()) == 1 and sum(count()) == 6",
    """
    import contextlib, io
    with contextlib.redirect_stdout(io.StringIO()) as said:
        say(3)
    assert said.getvalue() == "said 3\\n"
    """,
    "assert chain().next.value == 2 and chain() == chain() and chain().next.next is None",
    "import solution\nfrom solution import same as other\nassert solution.same(1) == other(1) == 1",
    "def test_one():\n    assert same(1) == 1\ndef test_two():\n    assert same(2) == 2",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(same(1), 1)\n"
    "        with self.assertRaises(ValueError): fail(1)",
]  # fmt: skip


def test_what_tests_may_ask(server):
    examined = examine(server, PROGRAM, *FINE)
    wrong = [test for test, fine in zip(FINE, examined.passed, strict=True) if not fine]
    assert not wrong, examined.problem


FAILING = [
    "assert same(5) == 6",
    "assert Stack([1]) == Stack([2])",
    "assert Stack([1]) == [1]",
    "assert 3 in Stack([1])",
    "fail(3)",
    "undefined(3)",
    "def test_one():\n    assert same(1) == 2",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(same(1), 2)",
    "import sys\nassert same(1) == 1\nsys.exit(0)",
    "assert Stack([1]) + 3",
    "assert apply(lambda x: 1 / 0, 1)",
    "import os\nassert same(1) == 1\nos._exit(0)",
]


def test_what_fails(server):
    assert examine(server, PROGRAM, *FAILING).passed == [False] * len(FAILING)


def test_the_function_check_is_given_the_entry_point(server):
    tests = "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == 3\n    assert candidate(4) == 5\n"
    assert examine(server, "def f(x): return x + 1", tests, entry_point="f").passed == [True]
    assert examine(server, "def f(x): return 3", tests, entry_point="f").passed == [False]
    missing = examine(server, "def g(x): return x + 1", tests, entry_point="f")
    assert missing.passed == [False] and "does not define f" in missing.problem


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        (["def check(candidate):\n    assert candidate(2) == 3"], "never use the program"),
        (["assert 1 == 1"], "never use the program"),
        (["assert f(2) =="], "cannot be run: SyntaxError"),
        (["import no_such_module\nassert f(2) == 3"], "cannot be run: ModuleNotFoundError"),
        (["class A: pass\nassert f(A()) == 3"], "give the program a A, which is no plain data"),
    ],
)
def test_tests_that_are_wrong_say_nothing_of_the_program(server, tests, said):
    with pytest.raises(SandboxError, match=said):
        examine(server, "def f(x): return x + 1", *tests)


def test_what_a_program_lacks_is_its_own_fault(server):
    examined = examine(server, "import no_such_module\ndef f(x): return x + 1", "assert f(2) == 3")
    assert examined.passed == [False] and "no_such_module" in examined.problem
    assert "SyntaxError" in examine(server, "def f(:", "assert f(2) == 3").problem


def test_the_same_program_does_the_same_twice(server):
    program = "import random\ndef f(): return [random.random(), hash('a'), list({'a', 'b', 'c', 'd'})]"
    ask = "assert f() == 0"
    tests = [ask, "x = f()\nassert x == f(), str(x)"]
    assert examine(server, program, *tests) == examine(server, program, *tests)


def test_packages_are_seen_where_that_is_asked_for(server):
    program, test = (
        "import numpy as np\ndef f(x): return int(np.sum(np.arange(x)))",
        "assert f(4) == np.arange(4).sum()",
    )
    limits = Limits(seconds=60.0, memory=4 << 30)
    assert client.examine(client.server("auto", True), program, [test], limits).passed == [True]
    assert client.examine(server, program, [test], limits).passed == [False]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("First\n```python\nx = 1\n```\nor\n```python\nx = 2\n```\nso\n```\nout\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\n```json\n{}\n```", "x = 1\n"),
    ],
)
def test_the_program_of_a_completion(text, program):
    assert code.program(text) == program


def test_the_reward(server):
    texts = ["```python\ndef f(x): return x + 1\n```", "def f(x): return 3", "def f(x): return", "<think>", "x"]
    tests = [["assert f(2) == 3", "assert f(3) == 4"]] * 4 + [None]
    every, share = code.make(Code()), code.make(Code(score="fraction", setup="setup"))
    assert every([""] * 5, texts, tests=tests) == [1, 0, 0, 0, None]
    assert share([""] * 5, texts, tests=tests, setup=["import math"] * 5) == [1, 0.5, 0, 0, None]
    assert every([""], [texts[0]], tests=["assert f(2) == 3\nassert f(3) == 4"]) == [1]
    judged = rewards.call(
        rewards.made(REWARDS, [("code", Code())]), [""] * 3, texts[:3], {"tests": [tests[0], ["assert 1"], tests[0]]}
    )
    assert judged.values[[0, 2], 0].tolist() == [1, 0] and [report.sample for report in judged.reports] == [1]
    assert "never use the program" in str(judged.reports[0])
    assert judged.extras["code_problem"][0] == "" and "AssertionError" in judged.extras["code_problem"][2]


def test_programs_that_read_and_print(server):
    cases = [{"input": "1 2\n", "output": "3"}, {"input": "5 5\n", "output": "10\n"}]
    texts = ["print(sum(map(int, input().split())))", "print(3)", "print(3)\n1/0"]
    assert code.make(Code(score="fraction"))([""] * 3, texts, tests=[cases] * 3) == [1, 0.5, 0]
    (wrong,) = code.make(Code())([""], texts[:1], tests=[[{"input": "1"}]])
    assert isinstance(wrong, ValueError) and "mappings of input and output" in str(wrong)


@pytest.mark.parametrize("settings", [{"seconds": 0.0}, {"memory_mb": 1}, {"disk_mb": 0}, {"workers": 0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Code(**settings)


def test_no_isolation_is_told_when_the_run_begins(monkeypatch):
    def none(isolation, packages):
        raise SandboxError("nothing here")

    monkeypatch.setattr(client, "server", none)
    with pytest.raises(ConfigError, match=r"`rewards\.code`: nothing here"):
        code.make(Code())
