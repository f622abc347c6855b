"""Every method against peft on tiny random models: both formats, both ways, and what must hold of any adapter.

A method enters by a row in a module of `tests.peft.parity`.
"""

import importlib
import pkgutil

import chex
import jax
import numpy as np
import pytest

from jaxft.core import tree
from tests.peft import pairs, parity
from tests.peft.parity.case import Case

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _cases() -> dict[str, Case]:
    modules = [importlib.import_module(f"{parity.__name__}.{m.name}") for m in pkgutil.iter_modules(parity.__path__)]
    return {name: case for module in modules for name, case in getattr(module, "CASES", {}).items()}


CASES = _cases()
ROWS = [(name, model) for name, case in CASES.items() for model in case.models]
each = pytest.mark.parametrize(("name", "model"), ROWS, ids=[f"{n}-{m}".replace(" ", "_") for n, m in ROWS])


@each
def test_an_adapter_of_peft_gives_its_logits(name, model, tmp_path):
    """Loaded, merged and saved again it is the same; stripped, it is the base."""
    theirs = pairs.peft_model(model, CASES[name].theirs())
    params = pairs.load(model, pairs.peft_save(theirs, tmp_path / "theirs"))
    expected = pairs.torch_logits(theirs)
    base = pairs.logits(model, pairs.ours(model).params)
    assert np.abs(expected - base).max() > 1e-3
    chex.assert_trees_all_close(pairs.logits(model, params), expected, **CLOSE)
    chex.assert_trees_all_equal(pairs.logits(model, tree.strip(params)), base)
    again = pairs.load(model, pairs.save(model, params, tmp_path / "again"))
    chex.assert_trees_all_equal(again, params)
    if CASES[name].mergeable:
        chex.assert_trees_all_close(pairs.logits(model, tree.merge(params)), expected, **CLOSE)


@each
def test_our_adapter_gives_our_logits_in_peft(name, model, tmp_path):
    params = pairs.adapted(model, CASES[name].ours, jax.random.key(3))
    expected = pairs.logits(model, params)
    assert np.abs(expected - pairs.logits(model, pairs.ours(model).params)).max() > 1e-3
    theirs = pairs.peft_load(model, pairs.save(model, params, tmp_path / "ours"), CASES[name].copies)
    chex.assert_trees_all_close(pairs.torch_logits(theirs), expected, **CLOSE)
