"""Is a method right? `check_method` puts one of your own to the checks that every method of the package passes.

Usage:
    jaxft.testing.check_method(MyMethod(rank=4))
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax

from jaxft import peft
from jaxft.peft.sites import Targeted
from jaxft.testing import form_checks, model_checks, report, structure_checks, weight_checks
from jaxft.testing.claims import Broken
from jaxft.testing.model_checks import Trial
from jaxft.testing.report import FOUND, Failure
from jaxft.testing.subject import F32, Row, Subject, adapted, affine, matrix

SIZES = (32, 64)


def check_method(method: Any, *, identity: bool = True, dense_gradient: bool = False, model: bool = True) -> None:
    """Raises AssertionError listing in words every property that the method breaks; returns None if it breaks none.

    What the method's class itself lacks is told first, and alone.

    Args:
      method: a config, or its class if it has defaults for all of its fields.
      identity: whether the adapted model is the base before training.
      dense_gradient: whether the map needs a matrix as large as the base's.
      model: whether to run it in a whole decoder too (training step, packing, generation, mesh); half a minute.
    """
    config = _default(method) if isinstance(method, type) else method
    failures = list(_failures(config, identity, dense_gradient, model))
    if failures:
        raise AssertionError(report.summary(type(config).__name__, failures))


def _default(cls: type) -> Any:
    try:
        return cls()
    except TypeError as error:
        raise TypeError(f"{error}; expected a config, check_method({cls.__name__}(...))") from None


def rows(config: Targeted, identity: bool = True, dense_gradient: bool = False) -> dict[str, Row]:
    """A method on plain matrices, on matrices with biases, on some layers only, and on a LoRA."""
    build = adapted(matrix, replace(config, targets=("w",)), sizes=SIZES)
    leaf = jax.eval_shape(lambda key: build(key, F32), jax.random.key(0))
    holds = {"identity": identity, "dense_gradient": dense_gradient, "matrix": leaf.mergeable}
    here, some = replace(config, targets=("w",)), replace(config, targets=("w",), layers=(0, 2))
    lora = peft.LoRA(rank=2, targets=("w",))
    return {
        "a stack of matrices": Row(adapted(matrix, here, sizes=SIZES), **holds),
        "matrices with biases": Row(adapted(affine, here, sizes=SIZES), **holds),
        "the first and last of three layers": Row(adapted(matrix, some, sizes=SIZES), **holds, left_out=(1,)),
        "on top of a LoRA": Row(adapted(affine, lora, here, sizes=SIZES), **holds),
    }


def _failures(config: Any, identity: bool, dense_gradient: bool, model: bool) -> Iterator[Failure]:
    with jax.default_matmul_precision("highest"):
        if isinstance(config, Targeted):
            alone = Subject(Row(adapted(matrix, replace(config, targets=("w",)), sizes=SIZES)))
            for check in form_checks.CHECKS:
                for failure in _failure(check, alone, "a stack of matrices"):
                    yield failure
                    return
            checks = (*weight_checks.CHECKS, *structure_checks.CHECKS)
            for where, row in rows(config, identity, dense_gradient).items():
                subject = Subject(row)
                with jax.numpy_dtype_promotion("strict"):
                    for check in checks:
                        yield from _failure(check, subject, where)
        if model:
            trial = Trial(config, identity)
            for check in model_checks.CHECKS:
                yield from _failure(check, trial, "a tiny decoder")


def _failure(check: Callable[[Any], None], subject: Any, where: str) -> Iterator[Failure]:
    words = " ".join((check.__doc__ or check.__name__).split())
    try:
        check(subject)
    except Broken as error:
        found = textwrap.shorten(str(error), FOUND, placeholder=" ...")
        yield Failure(words, where, found, cause=words)
    except Exception as error:
        found = report.told(error)
        yield Failure(words, where, found, cause=f"{type(error).__name__}{report.place(error) or found}")
