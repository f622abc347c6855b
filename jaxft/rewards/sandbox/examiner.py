"""The process that runs tests of a program that is in another process.

The names that the program defines stand for what is there: a call goes over, and plain data comes back, made here from
its parts. What is no plain data stays there and is a `Remote` here, which never equals a value of the tests and takes
no part in arithmetic or order with one: an object that says it equals everything is not asked.
"""

import ast
import builtins
import contextlib
import importlib
import inspect
import json
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

from . import values

USUAL = {"np": "numpy", "pd": "pandas"}
"""Modules that are known by another name."""


class Ended(Exception):
    """The program is gone, or says what cannot be understood."""


class NotGiven(TypeError):
    """What the tests cannot give to the program."""


class Peer:
    """The tests' end of the channel."""

    def __init__(self, channel: int) -> None:
        self.channel, self.given, self.calls = channel, list[Any](), 0
        self.errors: dict[str, type] = {}
        self.fault = ""

    def ask(self, do: str, *args: Any, **named: Any) -> Any:
        """What comes of doing something with the program's objects. Raises what it raises, and Ended."""
        self.calls += 1
        try:
            given = {"args": self.packed([*args]), "named": {key: self.packed(v) for key, v in named.items()}}
        except NotGiven as error:
            self.fault = str(error)
            raise
        self.send({"do": do, **given})
        answer = self.heard()
        while "back" in answer:
            self.send(self.called_back(*answer["back"]))
            answer = self.heard()
        sys.stdout.write(str(answer.get("printed", "")))
        if "raised" in answer:
            raise self.error(answer["raised"])
        for place, now in answer.get("changed", {}).items():
            _follow(args[int(place)], self.unpacked(now))
        return self.unpacked(answer["value"])

    def called_back(self, number: int, args: list[Any], named: dict[str, Any]) -> dict[str, Any]:
        """A function of the tests that the program was given, called by it."""
        try:
            found = self.given[number](*self.unpacked(args), **{key: self.unpacked(v) for key, v in named.items()})
            return {"value": self.packed(found)}
        except Ended:
            raise
        except Exception as error:
            return {"raised": [type(error).__name__, str(error)]}

    def send(self, message: dict[str, Any]) -> None:
        try:
            values.send(self.channel, message)
        except OSError:
            raise Ended("the program has ended") from None

    def heard(self) -> dict[str, Any]:
        try:
            message = values.receive(self.channel)
        except (EOFError, OSError):
            raise Ended("the program has ended") from None
        except values.Unknown as error:
            raise Ended(f"the program answers with {error}") from None
        if not isinstance(message, dict):
            raise Ended("the program answers with what is no message")
        return message

    def packed(self, value: Any) -> Any:
        return values.pack(value, self.other)

    def other(self, value: Any) -> Any:
        """What stands for a value that is no plain data: an object of the program's, or a function of the tests."""
        if isinstance(value, Remote):
            return {"object": object.__getattribute__(value, "_number")}
        if not callable(value):
            raise NotGiven(f"they give the program a {type(value).__name__}, which is no plain data and no function")
        self.given.append(value)
        return {"function": len(self.given) - 1}

    def unpacked(self, held: Any) -> Any:
        try:
            return values.unpack(held, self.made)
        except (values.Unknown, RecursionError) as error:
            raise Ended(f"the program answers with {error}") from None

    def made(self, name: str, inner: Any) -> Any:
        if name != "object" or not isinstance(inner, list) or len(inner) != 2 or not isinstance(inner[0], int):
            raise values.Unknown(f"{name}: {inner!r}"[:200])
        return (RemoteFunction if inner[1] else Remote)(self, inner[0])

    def error(self, told: Any) -> Exception:
        """An exception of the program's as one of the tests': of its nearest built-in class, or of a class by name."""
        if not isinstance(told, list) or len(told) != 3:
            return Ended("the program raises what cannot be understood")
        base, own, said = map(str, told)
        cls = self.errors.get(own) or getattr(builtins, base, Exception)
        if not isinstance(cls, type) or not issubclass(cls, Exception):
            return Ended(f"the program raises {own}: {said}")  # SystemExit, say, which would end the tests
        try:
            return cls(said)
        except TypeError:  # UnicodeDecodeError, say, takes more
            return type(own, (cls,), {"__init__": lambda self, text: None, "__str__": lambda self: said})(said)


def _follow(value: Any, now: Any) -> None:
    """A value of the tests that the program has changed in place, changed likewise."""
    if type(value) is not type(now) or value == now:
        return
    if isinstance(value, list | bytearray):
        value[:] = now
    else:
        value.clear()
        value.update(now)


class Remote:
    """An object of the program's."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in ("__name__", "__doc__", "__dict__"):
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._peer.ask("delattr", self, name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Remote):
            return False
        return self._number == other._number or self._peer.ask("eq", self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._peer.ask("hash", self))

    def __iter__(self) -> Iterator[Any]:
        items = self._peer.ask("iter", self)
        return iter(items) if not isinstance(items, Remote) else items._items()

    def _items(self) -> Iterator[Any]:
        while True:
            try:
                item = self._peer.ask("next", self)
            except StopIteration:
                return
            yield item

    def __next__(self) -> Any:
        return self._peer.ask("next", self)

    def __contains__(self, value: object) -> bool:
        return any(item is value or item == value for item in self)  # not asked: it would say yes to anything

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Remote) and self._peer.ask("isinstance", value, self) is True

    def __subclasscheck__(self, value: object) -> bool:
        return isinstance(value, Remote) and self._peer.ask("issubclass", value, self) is True

    def __exit__(self, *error: object) -> None:
        self._peer.ask("leave", self)


class RemoteFunction(Remote):
    """An object of the program's that can be called."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._peer.ask("call", self, *args, **named)


def _alone(do: str) -> Any:
    return lambda self, *args: self._peer.ask(do, self, *args)


def _beside(do: str) -> Any:
    return lambda self, other: self._peer.ask(do, self, other) if isinstance(other, Remote) else NotImplemented


for _name in ("len", "str", "repr", "bool", "int", "float", "complex", "abs", "round", "neg", "pos", "invert", "index",
              "reversed", "getitem", "setitem", "delitem", "enter", "bytes", "dir", "format"):  # fmt: skip
    setattr(Remote, f"__{_name}__", _alone(_name))
for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_",
              "xor"):  # fmt: skip
    setattr(Remote, f"__{_name.rstrip('_')}__", _beside(_name))


def main(files: list[int]) -> None:
    """Reads tests, runs them, and writes a line of JSON for each that has run, and one at the end."""
    with open(files[0], encoding="utf-8", errors="surrogatepass") as text:
        asked = json.load(text)
    verdict = open(files[2], "w", encoding="utf-8")

    def tell(line: dict[str, Any]) -> None:
        verdict.write(json.dumps(line) + "\n")
        verdict.flush()

    tell({"ready": True})
    peer = Peer(files[1])
    try:
        trees = [ast.parse(test, f"test {number}") for number, test in enumerate(asked["tests"])]
    except (SyntaxError, ValueError) as error:
        tell({"fault": problem(error)})
        trees = []
    try:
        names = begun(peer)
    except Exception as error:
        tell({"done": True, "calls": 0, "problem": problem(error)})
        return
    plain = {name for name, value in names.items() if not isinstance(value, Remote | type)}
    uses = 0
    for number, tree in enumerate(trees):
        try:
            uses += sum(isinstance(node, ast.Name) and node.id in plain for node in ast.walk(tree))
            run(tree, names, asked["entry_point"])
            tell({"test": number, "passed": True})
        except BaseException as error:
            # what the tests lack is not the program's fault
            if isinstance(error, ModuleNotFoundError) and error.name in imported(tree):
                peer.fault = problem(error)
            tell({"test": number, "passed": False, "problem": problem(error)})
    if peer.fault:
        tell({"fault": peer.fault})
    tell({"done": True, "calls": peer.calls + uses})


def begun(peer: Peer) -> dict[str, Any]:
    """The names that the program defines. Raises what running it raised."""
    hello = peer.heard()
    if "raised" in hello:
        raise peer.error(hello["raised"])
    if not all(isinstance(hello.get(kind), dict) for kind in ("names", "modules", "errors")):
        raise Ended("the program does not say what it defines")
    names = {name: peer.unpacked(value) for name, value in hello["names"].items() if allowed(name)}
    for name, module in hello["modules"].items():
        if allowed(name) and isinstance(module, str) and module in (name, USUAL.get(name)):  # the tests' own copy of it
            with contextlib.suppress(ImportError):
                names[name] = importlib.import_module(module)
    for name, base in hello["errors"].items():
        cls = getattr(builtins, str(base), None)
        if allowed(name) and isinstance(cls, type) and issubclass(cls, Exception):
            peer.errors[name] = names[name] = type(name, (cls,), {})
    module = types.ModuleType("solution")
    module.__dict__.update(names)
    sys.modules["solution"] = module
    return {"__name__": "tests", "__builtins__": builtins} | names


def allowed(name: str) -> bool:
    """Whether the tests may know something of the program's by its name: no `abs` or `len` of its own."""
    return name.isidentifier() and not name.startswith("__") and not hasattr(builtins, name)


def run(tree: ast.Module, names: dict[str, Any], entry_point: str | None) -> None:
    """Runs a test, and what it defines to be run: unittest's cases, functions test_... that nothing calls, and, with an
    entry point, ``check(entry point)``."""
    before = dict(names)
    exec(compile(tree, "tests", "exec"), names)
    new = {name: value for name, value in names.items() if before.get(name) is not value}
    mentioned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name, value in new.items():
        if isinstance(value, type) and issubclass(value, unittest.TestCase) and value.__module__ == "tests":
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
            if not result.wasSuccessful():
                raise AssertionError([*result.failures, *result.errors][0][1].strip().splitlines()[-1])
        elif isinstance(value, types.FunctionType) and name.startswith("test_") and name not in mentioned:
            if not inspect.signature(value).parameters:
                value()
    if entry_point is not None and "check" in new:
        if entry_point not in names:
            raise NameError(f"the program does not define {entry_point}")
        names["check"](names[entry_point])


def imported(tree: ast.Module) -> set[str]:
    """The modules that tests import, and the packages that they are in."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {".".join(parts[: i + 1]) for name in found for parts in [name.split(".")] for i in range(len(parts))}


def problem(error: BaseException) -> str:
    """What is told of a failure."""
    said = f"{type(error).__name__}: {error}" if not isinstance(error, Ended) else str(error)
    return said.rstrip(": ")[:500]
