"""KTO: trl's numbers with mismatched completions, over the whole batch whatever its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import KTO, OBJECTIVES, terms
from tests.objectives import completions, trl_reference
from tests.objectives.whole import annotated, part_of, total

ROW = OBJECTIVES["kto"]
LABEL = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1], bool)


def draw(seed, gain):
    """Completions, and those of other prompts, of which the policy thinks more of than the reference by ``gain``."""
    beside = completions.draw(12, seed + 100)
    return completions.draw(12, seed), dataclasses.replace(beside, ref=beside.logp - np.float32(gain) + beside.ref / 8)


def rows(given, beside, a_row=3, room=1):
    scores, batch = completions.rows(given, a_row, room=room)
    apart, other = completions.rows(beside, a_row, pad=5, room=room)
    label = np.pad(LABEL.reshape(-1, a_row), ((0, 0), (0, room)), constant_values=True)
    scores |= {f"{view}/kl": apart[view] for view in ("policy", "reference")}
    return scores, batch | {f"kl_{name}": x for name, x in other.items()} | {"label": jnp.asarray(label)}


CONFIGS = [KTO(), KTO(beta=0.4, desirable_weight=1.5, undesirable_weight=0.5), KTO(loss="apo_zero_unpaired", beta=0.2)]


@pytest.mark.parametrize("gain", [2.0, -2.0])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss}-{c.beta}")
def test_loss_gradient_and_metrics_are_those_of_trl(config, gain):
    """Three sequences a row, with room for one more. A mean gain below 0 counts as 0."""
    given, beside = draw(0, gain)
    settings = {n: getattr(config, n) for n in ("beta", "desirable_weight", "undesirable_weight")}
    want, want_grad, want_metrics = trl_reference.kto(given, beside, LABEL, loss_type=config.loss, **settings)
    value, grad, metrics = total(ROW, config, *rows(given, beside))
    assert value == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(completions.back(np.asarray(grad), given, 3), want_grad, rtol=1e-4, atol=1e-8)
    for name, number in metrics.items():
        if name != "mean_token_accuracy":  # which trl has not
            assert number == pytest.approx(want_metrics[name], rel=2e-5, abs=1e-6), name
    assert (metrics["kl"] > 0) == (config.loss == "kto" and gain > 0)
    assert {"rewards/margins", "rewards/chosen", "logps/rejected", "entropy", "kl"} < set(metrics)


def test_parts_add_up_to_the_batch():
    scores, batch = rows(*draw(1, 2.0))
    value, _, metrics = total(ROW, KTO(), scores, batch)
    whole, _ = annotated(ROW, KTO(), scores, batch, {})
    found = [part_of(ROW, KTO(), scores, whole, {}, *part) for part in ((0, 1), (1, 4))]
    losses, more = (terms.values(terms.add(a, b)) for a, b in zip(*found, strict=True))
    assert float(losses["kto"]) == pytest.approx(value, rel=1e-6)
    for name, number in metrics.items():
        assert float(more[name]) == pytest.approx(number, rel=1e-5), name


def test_by_hand():
    """Log-ratios 2 (desirable) and -1 (not), mismatched 1 and 3, so z0 = 2; β = 1: 1 - σ(0) = 1/2 and 1 - σ(3) =
    0.0474, weighted 1 and 2."""
    one = {
        "segments": jnp.array([[1], [1]]),
        "loss_mask": jnp.array([[True]] * 2),
        "sequence_mask": jnp.array([[True]] * 2),
    }
    batch = one | {f"kl_{name}": x for name, x in one.items()} | {"label": jnp.array([[True], [False]])}
    logp = lambda *x: {"logp": jnp.array(x, jnp.float32)[:, None]}  # noqa: E731
    scores = {
        "policy": logp(-1, -4), "reference": logp(-3, -3), "policy/kl": logp(-2, -2), "reference/kl": logp(-3, -5)
    }  # fmt: skip
    config = KTO(beta=1.0, undesirable_weight=2.0)
    value, grad, metrics = total(ROW, config, scores, batch)
    assert value == pytest.approx((0.5 + 2 * 0.0474258732) / 2, rel=1e-6)
    np.testing.assert_allclose(grad[:, 0], [-0.25 / 2, 2 * 0.0451766597 / 2], rtol=1e-5)  # σ'(0) and σ'(3)
    assert metrics["kl"] == 2.0 and metrics["rewards/margins"] == 3.0


def test_weights_and_what_it_asks_for():
    scores, batch = rows(*draw(2, 1.0))
    zeros = jax.tree.map(jnp.zeros_like, scores)
    found = [ROW.fn(KTO(), s, annotated(ROW, KTO(), s, batch, {})[0], {})[0]["kto"].weight for s in (scores, zeros)]
    assert [float(w) for w in found] == [12.0, 12.0]
    assert ROW.asked(KTO()) == (("logp",), ("correct", "entropy"), ("policy", "reference"), ("kl",), ())
    assert ROW.asked(KTO(loss="apo_zero_unpaired")).asides == () and ROW.rows == "labelled"
    with pytest.raises(ValueError, match=r"objective.undesirable_weight: got 0"):
        KTO(undesirable_weight=0)
