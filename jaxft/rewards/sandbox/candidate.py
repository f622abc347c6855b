"""The process that runs a program: it hears what is called, and answers with what comes of it.

Nothing here is trusted by anyone. The program can change all of it.
"""

import builtins
import contextlib
import io
import operator
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from . import values

PRINTED = 1 << 20
"""Characters of what a call prints that are passed on."""

DONE: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **named: function(*args, **named),
    **{name: getattr(builtins, name) for name in (
        "getattr", "setattr", "delattr", "hasattr", "len", "iter", "next", "str", "repr", "bool", "int", "float",
        "complex", "abs", "round", "isinstance", "issubclass", "callable", "reversed", "hash", "bytes", "dir", "format",
    )},
    **{name: getattr(operator, name) for name in (
        "getitem", "setitem", "delitem", "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "matmul", "truediv",
        "floordiv", "mod", "pow", "and_", "or_", "xor", "neg", "pos", "invert", "index",
    )},
    "enter": lambda manager: type(manager).__enter__(manager),
    "leave": lambda manager: type(manager).__exit__(manager, None, None, None),
}  # fmt: skip
"""What may be done with the program's objects."""


class Printed(io.StringIO):
    """What is printed, as far as it is passed on."""

    def write(self, text: str) -> int:
        """Forgets what is too much."""
        return super().write(text[: max(0, PRINTED - self.tell())])


class Channel:
    """The program's end: its objects by number, and the tests' functions by theirs."""

    def __init__(self, channel: int) -> None:
        self.channel, self.objects = channel, list[Any]()

    def packed(self, value: Any) -> Any:
        """A value as it is sent; what is no plain data as the number of an object."""
        try:
            return values.pack(value, self.other)
        except RecursionError:
            return self.other(value)

    def other(self, value: Any) -> Any:
        self.objects.append(value)
        return {"object": [len(self.objects) - 1, callable(value)]}

    def unpacked(self, held: Any) -> Any:
        return values.unpack(held, lambda name, inner: self.objects[inner] if name == "object" else self.stub(inner))

    def stub(self, number: int) -> Callable[..., Any]:
        """A function of the tests."""

        def called(*args: Any, **named: Any) -> Any:
            items = [self.packed(arg) for arg in args], {key: self.packed(arg) for key, arg in named.items()}
            values.send(self.channel, {"back": [number, *items]})
            while True:
                message = values.receive(self.channel)
                if "do" not in message:
                    break
                self.serve(message)
            if "raised" in message:
                raise getattr(builtins, message["raised"][0], Exception)(message["raised"][1])
            return self.unpacked(message["value"])

        return called

    def serve(self, message: dict[str, Any]) -> None:
        """Does what is asked, and answers."""
        printed = Printed()
        try:
            args = self.unpacked(message["args"])
            named = {key: self.unpacked(arg) for key, arg in message["named"].items()}
            with contextlib.redirect_stdout(printed):
                value = DONE[message["do"]](*args, **named)
            changed = {i: self.packed(arg) for i, arg in enumerate(args) if type(arg) in (list, dict, set, bytearray)}
            answer = {"value": self.packed(value), "changed": changed}
        except BaseException as error:
            answer = {"raised": told(error)}
        values.send(self.channel, answer | {"printed": printed.getvalue()})


def told(error: BaseException) -> list[str]:
    """The nearest built-in class of an exception, its own class, and what it says."""
    return [nearest(type(error)), type(error).__name__, str(error)[:2000]]


def nearest(cls: type) -> str:
    """The nearest built-in class of a class."""
    return next(base.__name__ for base in cls.__mro__ if getattr(builtins, base.__name__, None) is base)


def functions(files: list[int]) -> None:
    """Runs a program as a module named solution, says what it defines, and does what is asked of it."""
    text, channel = _text(files[0]), Channel(files[1])
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        with contextlib.redirect_stdout(Printed()):
            exec(compile(text, "solution.py", "exec"), module.__dict__)
    except BaseException as error:
        values.send(channel.channel, {"raised": told(error)})
        return
    named, modules, errors = dict[str, Any](), dict[str, str](), dict[str, str]()
    for name, value in module.__dict__.items():
        if isinstance(value, types.ModuleType):
            modules[name] = value.__name__
        elif isinstance(value, type) and issubclass(value, Exception) and value.__module__ == "solution":
            errors[name] = nearest(value)
        named[name] = channel.packed(value)
    values.send(channel.channel, {"names": named, "modules": modules, "errors": errors})
    while True:
        channel.serve(values.receive(channel.channel))


def script(files: list[int]) -> None:
    """Runs a program as a script, its input and output being files."""
    text = _text(files[0])
    os.dup2(files[1], 1)
    os.dup2(files[2], 0)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    code = 1
    try:
        exec(compile(text, "solution.py", "exec"), module.__dict__)
        code = 0
    except SystemExit as error:
        code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code & 0xFF)


def _text(file: int) -> str:
    with open(file, encoding="utf-8", errors="surrogatepass") as text:
        return text.read()
