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
    assert said.startswith("Gain breaks 1 property")
    assert "also: matrices with biases; on top of a LoRA" in said  # of the third row it looks at a layer left out
    assert "At initialisation the adapted weight equals the base" in said
    assert "a stack of matrices: x @ w before training" in said


def test_a_class_with_defaults_and_a_model(monkeypatch):
    monkeypatch.setattr(weight_checks, "CHECKS", ())
    monkeypatch.setattr(structure_checks, "CHECKS", ())
    monkeypatch.setattr(testing.model_checks, "CHECKS", testing.model_checks.CHECKS[:2])
    testing.check_method(Gain)
    with pytest.raises(AssertionError, match=r"a tiny decoder: the gradient of layers/.*gain is zero"):
        testing.check_method(Gain(fault="stuck"))


@weight
class TrainedBase(GainWeight):
    base: Any = trainable()


@weight
class Untrained(GainWeight):
    gain: Any = parameter()


@weight
class StaticGain(GainWeight):
    gain: Any = static()
    other: Any = trainable(default=None)


@dataclass(frozen=True)
class Malformed(Targeted):
    """A `Gain` made wrongly."""

    fault: str = ""
    """Which of `MALFORMED`."""

    def wrap(self, site):
        gain = jnp.zeros((*site.layers.shape, site.shape[0]))
        return MALFORMED[self.fault][0](site, gain)


@dataclass(frozen=True)
class Unfinished(Targeted):
    """No wrap."""


MALFORMED = {
    "axes": (lambda s, g: GainWeight(s.base, g[0], s.gate), ["gain has shape [32], expected [3, 32]", "site.draw(fn)"]),
    "number": (lambda s, g: GainWeight(s.base, 2.0, s.gate), ["gain holds the float 2.0", "site.values(number)"]),
    "raises": (lambda s, g: s.nothing, ["wrap(site) raises AttributeError", "test_check_method.py, line"]),
    "no weight": (lambda s, g: None, ["wrap(site) gives a NoneType; expected a Weight"]),
    "base trains": (lambda s, g: TrainedBase(s.base, g, s.gate), ["base is declared trainable", "= parameter()"]),
    "nothing": (lambda s, g: Untrained(s.base, g, s.gate), ["nothing to train", "gate (frozen)", "= trainable()"]),
    "static": (lambda s, g: StaticGain(s.base, g, s.gate), ["gain is static() and holds a", "no hash"]),
    "half": (lambda s, g: GainWeight(s.base, g.astype(jnp.bfloat16), s.gate), ["bfloat16; expected float32"]),
    "product": (lambda s, g: GainWeight(s.base, g[:, :5], s.gate), ["x @ w raises", "gain [5]", "in __rmatmul__"]),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_method_is_told_once_in_words(fault):
    with pytest.raises(AssertionError) as caught:
        testing.check_method(Malformed(fault=fault))
    said = str(caught.value)
    assert said.startswith("Malformed breaks 1 property:") and len(said) < 800
    assert not [words for words in MALFORMED[fault][1] if words not in said], said


def test_a_class_without_defaults():
    @dataclass(frozen=True)
    class Ranked(Gain):
        rank: int = dataclasses.field(kw_only=True)

    with pytest.raises(TypeError, match=r"'rank'; expected a config, check_method\(Ranked\(\.\.\.\)\)"):
        testing.check_method(Ranked)


def test_a_method_without_wrap():
    with pytest.raises(AssertionError, match=r"Unfinished has no wrap\(site\)"):
        testing.check_method(Unfinished)


def test_one_cause_is_told_once_without_dumps(monkeypatch):
    """A matrix of the base's shape is computed, in float32: three properties, and one line breaks two more."""
    checks = (
        structure_checks.backward_holds_nothing_dense,
        structure_checks.many_adapters_are_one_vmap,
        structure_checks.scan_does_not_restack_the_base,
    )
    half = weight_checks.bf16_model_with_f32_adapters, weight_checks.merge_in_bf16_rounds_once
    monkeypatch.setattr(structure_checks, "CHECKS", checks)
    monkeypatch.setattr(weight_checks, "CHECKS", half)
    with pytest.raises(AssertionError) as caught:
        testing.check_method(Gain(fault="dense"), model=False)
    said = str(caught.value)
    assert len(said) < 2000 and max(map(len, said.splitlines())) < 400
    assert said.count("dtypes are mixed") == 1 and "self.a.astype(x.dtype) (test_check_method.py, line" in said
    assert "so too: On a bfloat16 base the merged matrix" in said
    assert "is written, by" in said and "metadata" not in said
