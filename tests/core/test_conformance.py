"""What every Weight must do, whatever it is: each check of `jaxft.testing` on each row of `weights.ROWS`."""

import functools

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from jaxft.core import verbs
from jaxft.testing import structure_checks, weight_checks
from jaxft.testing.claims import same
from jaxft.testing.subject import F32, Subject, matrix
from tests.core.weights import ROWS

rows = pytest.mark.parametrize("name", ROWS, ids=[name.replace(" ", "_").replace(",", "") for name in ROWS])


@functools.cache
def subject(name: str) -> Subject:
    return Subject(ROWS[name])


@pytest.mark.parametrize("check", (*weight_checks.CHECKS, *structure_checks.CHECKS), ids=lambda check: check.__name__)
@rows
def test_weight(check, name):
    check(subject(name))


@rows
def test_save_and_restore(name, tmp_path):
    stack = subject(name).stack
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"w": stack})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: {"w": stack}))
    chex.assert_trees_all_equal(restored, {"w": stack})
    assert jax.tree.structure(restored) == jax.tree.structure({"w": stack})


def test_plain_arrays_pass_the_same_doors(key):
    w = matrix(key, F32)
    x = jnp.ones((2, w.shape[1]))
    chex.assert_trees_all_close(verbs.dense(w), w)
    same(structure_checks.loop(x, w), structure_checks.scanned(x, w), "a loop and a scan")
