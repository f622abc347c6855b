"""Losses of pairs: equal to trl's, gradients too; by hand; finite at extremes; options refused by name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives.preference import LOSSES
from tests.objectives import completions, trl_reference

OPTIONS = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}, "aot": {"label_smoothing": 0.2}}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
CASES = [(name, {"beta": 0.3, **OPTIONS.get(name, {})}) for name in LOSSES]
CASES += [("aot_unpaired", {"label_smoothing": 0.1}), ("discopop", {"discopop_tau": 0.5, "beta": 2.0})]
CASES += [
    (n, {**OPTIONS.get(n, {}), "f_divergence_type": d}) for n in LOSSES if LOSSES[n].divergence for d in DIVERGENCES
]
CASES += [("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a}) for a in (0.0, 1.0, 2.0)]


def sums(logp, given):
    """float32[P] of chosen and of rejected."""
    total = jnp.sum(jnp.where(given.completion, logp, 0.0), axis=1)
    return total[::2], total[1::2]


def mean_loss(name, logp, given, **options):
    lengths = sums(jnp.ones(logp.shape), given)
    value = LOSSES[name](
        *sums(logp, given), *sums(given.ref, given), chosen_len=lengths[0], rejected_len=lengths[1], **options
    )
    assert value.shape == lengths[0].shape and value.dtype == jnp.float32
    return jnp.mean(value)


@pytest.mark.parametrize(
    "name, options", CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_value_and_gradient_are_those_of_trl(name, options):
    given = completions.draw(12, seed=3)
    want, want_grad, _ = trl_reference.dpo(given, (name,), **options)
    got, grad = jax.value_and_grad(lambda logp: mean_loss(name, logp, given, **options))(jnp.asarray(given.logp))
    np.testing.assert_allclose(got, want, rtol=2e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=2e-5 * np.abs(want_grad).max())
    assert np.abs(want_grad).max() > 0


LN2, SIG1 = math.log(2), 1 / (1 + math.exp(-1))
HAND = {  # β = 0.5, r_w = 4, r_l = 2: βΔ = 1, βr_w = 2, βr_l = 1; 1/2β = 1; lengths 2 and 4
    "sigmoid": 0.31326169,  # ln(1 + 1/e)
    "hinge": 0.0,
    "ipo": 0.25,  # (4/2 - 2/4 - 1)²
    "nca_pair": 0.126928 + 0.5 * 2.126928 + 0.5 * 1.31326169,
    "robust": (0.9 * 0.31326169 - 0.1 * 1.31326169) / 0.8,
    "exo_pair": SIG1 * (-0.31326169 - math.log(0.9)) + (1 - SIG1) * (-1.31326169 - math.log(0.1)),
    "bco_pair": 0.126928 + 1.31326169,
    "sppo_hard": 9.0 + 9.0,  # (4 - 1)² + (2 + 1)²
    "apo_zero": 1 - 0.8807970780 + 0.7310585786,
    "apo_down": 0.8807970780 + 1 - 0.7310585786,
    "aot": 0.9 * 0.31326169 + 0.1 * 1.31326169,
    "aot_unpaired": 0.9 * 0.31326169 + 0.1 * 1.31326169,
    "discopop": 0.0 + 1 / math.e,  # m = σ(20) is 1
    "sft": 5.0,  # -log π(y_w) = 10 over 2 tokens
    "sigmoid_norm": 0.38687101,  # ln(1 + exp(-0.75)): 0.5 (4/2 - 2/4) = 0.75
}


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    """log π(y_w) = -10 on -14, log π(y_l) = -20 on -22."""
    options = {"label_smoothing": 0.1} if "label_smoothing" in LOSSES[name].options else {}
    pair = [jnp.array([x], jnp.float32) for x in (-10, -20, -14, -22)]
    got = LOSSES[name](*pair, chosen_len=jnp.array([2]), rejected_len=jnp.array([4]), beta=0.5, **options)
    assert float(got[0]) == pytest.approx(HAND[name], rel=1e-5)


def test_policy_and_reference_alike_cost_ln_2():
    pair = jnp.array([-3.0, -90.0]), jnp.array([-7.0, -1.0])
    for name in ("sigmoid", "robust", "aot_unpaired", "sigmoid_norm"):
        same = (pair[0], pair[0]) if name == "aot_unpaired" else pair
        lengths = {"chosen_len": jnp.array([3, 5]), "rejected_len": jnp.array([2, 9])}
        np.testing.assert_allclose(LOSSES[name](*same, *same, **lengths), [LN2, LN2], rtol=1e-6)


@pytest.mark.parametrize(
    "name, divergence", [(n, d) for n in LOSSES for d in (DIVERGENCES if LOSSES[n].divergence else [None])]
)
def test_extremes_are_finite_and_so_are_their_gradients(name, divergence):
    """Log-probabilities from -1e8 to 0 under either, in every combination; and the sum over all of them."""
    options = OPTIONS.get(name, {}) | ({"f_divergence_type": divergence} if divergence else {}) | {"beta": 10.0}
    if divergence == "alpha_divergence":
        options["f_alpha_divergence_coef"] = 0.999  # divides by a thousandth
    values = jnp.array([-1e8, -1e4, -100.0, -1.0, 0.0])
    four = [g.ravel() for g in jnp.meshgrid(values, values, values, values)]
    ones = jnp.ones(four[0].shape)
    run = lambda *logps: LOSSES[name](*logps, chosen_len=ones, rejected_len=3 * ones, **options)  # noqa: E731
    assert bool(jnp.all(jnp.isfinite(run(*four)))) and bool(jnp.isfinite(jnp.sum(run(*four))))
    for grad in jax.grad(lambda *logps: jnp.sum(run(*logps)), argnums=(0, 1))(*four):
        assert bool(jnp.all(jnp.isfinite(grad)))


def test_unknown_options_and_values_are_refused():
    pair = [jnp.zeros(2)] * 4
    with pytest.raises(TypeError, match=r"sigmoid: got the option label_smoothing; this loss takes f_divergence_type"):
        LOSSES["sigmoid"](*pair, label_smoothing=0.1)
    with pytest.raises(TypeError, match=r"nca_pair.*f_divergence_type"):
        LOSSES["nca_pair"](*pair, f_divergence_type="forward_kl")
    with pytest.raises(ValueError, match=r"f_divergence_type: got 'kl'"):
        LOSSES["sigmoid"](*pair, f_divergence_type="kl")
    with pytest.raises(ValueError, match=r"chosen_len and rejected_len"):
        LOSSES["ipo"](*pair)
    with pytest.raises(ValueError, match=r"exo_pair: label_smoothing is 0.0"):
        LOSSES["exo_pair"](*pair)
    with pytest.raises(ValueError, match=r"robust: label_smoothing is 0.5"):
        LOSSES["robust"](*pair, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"sigmoid: got arrays of the shapes \[\(2,\), \(2, 1\)\]"):
        LOSSES["sigmoid"](*pair[:3], jnp.zeros((2, 1)))


def test_lower_precision_is_taken_as_float32():
    pair = [jnp.array([-3.0], jnp.bfloat16), *[jnp.array([x], jnp.bfloat16) for x in (-4.0, -3.5, -3.5)]]
    assert LOSSES["sigmoid"](*pair).dtype == jnp.float32
