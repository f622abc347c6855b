"""`check_method` says what is wrong with a wrong method, and nothing of a right one."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft import testing
from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft import Targeted
from jaxft.testing import model_checks, structure_checks, weight_checks
from jaxft.testing.claims import Broken
from jaxft.testing.model_checks import Trial
from jaxft.testing.subject import Subject


@dataclass(frozen=True)
class Gain(Targeted):
    """A trained factor of each input feature: y = (x * (1 + g)) W."""

    fault: str = ""
    """What is wrong with it."""

    def wrap(self, site):
        start = jnp.ones if self.fault == "start" else jnp.zeros
        gate = jnp.ones_like(site.gate) if self.fault == "gate" else site.gate
        return FAULTS.get(self.fault, GainWeight)(site.base, start((*site.layers.shape, site.shape[0])), gate)


@weight
class GainWeight(Weight):
    base: Any = parameter()
    gain: jax.Array = trainable()
    gate: jax.Array

    def __rmatmul__(self, x):
        return (x * (1 + self.gate * self.gain).astype(x.dtype)) @ self.base


@weight
class DenseGain(GainWeight):
    def __rmatmul__(self, x):
        return x @ ((1 + self.gate * self.gain)[:, None] * self.base).astype(x.dtype)


@weight
class PromotingGain(GainWeight):
    def __rmatmul__(self, x):
        return (x.astype(jnp.float32) * (1 + self.gate * self.gain)) @ self.base.astype(jnp.float32)


@weight
class StuckGain(GainWeight):
    def __rmatmul__(self, x):
        return (x * (1 + self.gate * jax.lax.stop_gradient(self.gain)).astype(x.dtype)) @ self.base


@weight
class CurvedGain(GainWeight):
    def __rmatmul__(self, x):
        return jnp.sin((self.gate * self.gain).astype(x.dtype) * x) @ self.base + x @ self.base


@weight
class UngatedGain(GainWeight):
    def __rmatmul__(self, x):
        return (x * (1 + self.gain).astype(x.dtype)) @ self.base


@weight
class ArrayLikeGain(GainWeight):
    def __jax_array__(self):
        return self.base


@weight
class FunctionGain(GainWeight):
    f: Any = static(default=jnp.tanh)


FAULTS = {
    "dense": DenseGain, "dtype": PromotingGain, "stuck": StuckGain, "curved": CurvedGain, "array": ArrayLikeGain,
    "ungated": UngatedGain, "function": FunctionGain,
}  # fmt: skip
CAUGHT = {
    "start": (weight_checks.identity_at_initialisation, "base"),
    "gate": (weight_checks.layers_left_out_are_the_base, "keep site.gate"),
    "ungated": (weight_checks.layers_left_out_are_the_base, "and the base"),
    "dense": (structure_checks.backward_holds_nothing_dense, "dense"),
    "dtype": (weight_checks.bf16_model_with_f32_adapters, "cast the fields"),
    "stuck": (weight_checks.training_changes_it, "gradient cut"),
    "curved": (weight_checks.product_equals_dense, "differs"),
    "array": (structure_checks.stray_products_raise, "__jax_array__"),
}


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_fault_is_found_and_said(fault):
    check, words = CAUGHT[fault]
    row = "the first and last of three layers" if "gate" in fault else "a stack of matrices"
    config = Gain(fault=fault)
    with pytest.raises(AssertionError, match=words):
        check(Subject(testing.rows(config)[row]))
    check(Subject(testing.rows(dataclasses.replace(config, fault=""))[row]))


def test_what_cannot_be_saved_is_found():
    for fault in ("function", ""):
        trial = Trial(Gain(fault=fault))
        trial.params = trial.fresh[0]  # no need to train
        with pytest.raises(Broken, match="f: got a PjitFunction") if fault else contextlib.nullcontext():
            model_checks.saved_and_loaded_it_is_the_same(trial)


def test_the_report_lists_every_failure(monkeypatch):
    monkeypatch.setattr(weight_checks, "CHECKS", (weight_checks.identity_at_initialisation,))
    monkeypatch.setattr(structure_checks, "CHECKS", (structure_checks.stray_products_raise,))
    testing.check_method(Gain(), model=False)
    with pytest.raises(AssertionError) as caught:
        testing.check_method(Gain(fault="start"), model=False)
    said = str(caught.value)
    assert said.startswith("Gain breaks 3 properties")  # the layer of the fourth row that is looked at is left out
    assert "At initialisation the adapted weight equals the base" in said
    assert "a stack of matrices: x @ w before training" in said


def test_a_class_with_defaults_and_a_model(monkeypatch):
    monkeypatch.setattr(weight_checks, "CHECKS", ())
    monkeypatch.setattr(structure_checks, "CHECKS", ())
    monkeypatch.setattr(testing.model_checks, "CHECKS", testing.model_checks.CHECKS[:2])
    testing.check_method(Gain)
    with pytest.raises(AssertionError, match=r"a tiny decoder: the gradient of layers/.*gain is zero"):
        testing.check_method(Gain(fault="stuck"))
