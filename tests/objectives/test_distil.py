"""The distillation objective: hand arithmetic, what it asks for, and the targets that a teacher's tokens meet."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import OBJECTIVES, Distil, distil, terms

MASK = jnp.array([[False, True, True], [True, False, False]])
D = jnp.array([[9.0, 1.0, 2.0], [4.0, 9.0, 9.0]], jnp.float32)
LOGP = jnp.log(jnp.array([[0.5, 0.25, 0.125], [0.2, 0.1, 0.9]], jnp.float32))
POLICY = {"divergence": D, "logp": LOGP}


def run(config, policy=POLICY, **batch):
    return distil.distil(config, {"policy": policy}, {"loss_mask": MASK, **batch}, {})


def test_by_hand():
    """Of the targets: divergences 1 + 2 + 4 = 7, cross-entropies ln 4 + ln 8 + ln 5 = ln 160; of three tokens each.

    With weights 2 and 0.5 the loss is (2 * 7 + 0.5 * ln 160) / 3."""
    losses, metrics = run(Distil(weight=2.0, ce_weight=0.5))
    assert float(losses["distil"].total) == 14.0
    assert float(losses["ce"].total) == pytest.approx(math.log(160) / 2, rel=1e-6)
    assert {float(mean.weight) for mean in (*losses.values(), *metrics.values())} == {3.0}
    assert float(metrics["divergence"].total) == 7.0
    assert float(metrics["nll"].total) == pytest.approx(math.log(160), rel=1e-6)


def test_hidden_states_and_what_is_reported_by_hand():
    """0.1 * (3 + 5 + 7) from hidden states; the two models agree on one target of three."""
    config = Distil(hidden_layers=((-1, -1),), hidden_weight=0.1)
    hidden = jnp.array([[9.0, 3.0, 5.0], [7.0, 9.0, 9.0]])
    agreement = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    losses, metrics = run(config, {**POLICY, "hidden": hidden, "agreement": agreement})
    assert set(losses) == {"distil", "hidden"}
    assert float(losses["hidden"].total) == pytest.approx(1.5)
    means = terms.values(metrics)
    assert float(means["hidden"]) == 5.0 and float(means["teacher_agreement"]) == pytest.approx(1 / 3)


def test_masked_tokens_have_zero_gradient_and_metrics_none():
    config = Distil(ce_weight=1.0)
    losses = lambda policy: sum(mean.total for mean in run(config, policy)[0].values())  # noqa: E731
    for name, grad in jax.grad(losses)(POLICY).items():
        assert bool(jnp.all((grad != 0) == MASK)), name
    metrics = lambda policy: sum(mean.total for mean in run(config, policy)[1].values())  # noqa: E731
    assert not any(bool(jnp.any(grad != 0)) for grad in jax.grad(metrics)(POLICY).values())


@pytest.mark.parametrize(
    ("config", "needs", "views"),
    [
        (Distil(), ("divergence",), ("teacher", "policy")),
        (Distil(ce_weight=0.1), ("divergence", "logp"), ("teacher", "policy")),
        (Distil(teacher="stored"), ("divergence",), ("policy",)),
        (Distil(weight=0, ce_weight=1, hidden_layers=((0, 1),)), ("logp", "hidden"), ("teacher", "policy")),
        (Distil(divergence="uld"), ("divergence",), ("teacher", "policy")),
    ],
    ids=str,
)
def test_what_it_asks_for(config, needs, views):
    """Gradients only of what has a weight; the rest of divergence and log-probability is reported."""
    asked = OBJECTIVES["distil"].asked(config)
    assert (asked.needs, asked.views) == (needs, views)
    assert {"divergence", "logp"} <= {*asked.needs, *asked.reports} and not set(asked.needs) & set(asked.reports)
    assert ("agreement" in asked.reports) == (config.divergence != "uld")


def test_targets_that_another_tokenizer_has_too():
    """Sequence 1 has three targets for the student and two for the teacher, sequence 2 one and two, sequence 3 none for
    the teacher. The first two and the first one have a counterpart, at its own place."""
    student = {
        "segments": np.array([[1, 1, 1, 1, 1, 2, 2, 3, 3, 0]]),
        "loss_mask": np.array([[0, 0, 1, 1, 1, 0, 1, 0, 1, 0]], bool),
    }
    teacher = {
        "teacher_segments": np.array([[1, 1, 1, 0, 2, 2, 2, 2]]),
        "teacher_loss_mask": np.array([[0, 1, 1, 0, 0, 0, 1, 1]], bool),
    }
    batch = {name: jnp.asarray(a if a.dtype == bool else a.astype(np.int32)) for name, a in (student | teacher).items()}
    places, found = terms.counterparts(batch)
    assert found[0].tolist() == [False, False, True, True, False, False, True, False, False, False]
    assert places[0][jnp.array([2, 3, 6])].tolist() == [1, 2, 6]
    losses, _ = run(Distil(divergence="uld"), {"divergence": jnp.arange(10.0)[None]}, **batch)
    assert (float(losses["distil"].total), float(losses["distil"].weight)) == (2 + 3 + 6, 3)


def test_counterparts_without_segments():
    """A row is one sequence; a target that is not one of the teacher's keeps no place."""
    batch = {"loss_mask": jnp.ones((2, 3), bool), "teacher_loss_mask": jnp.array([[True, False], [False, False]])}
    places, found = terms.counterparts(batch)
    assert found.tolist() == [[True, False, False], [False, False, False]] and int(places[0, 0]) == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"beta": 1.5}, "beta"),
        ({"skew": 1.0}, "skew"),
        ({"ce_weight": -1.0}, "ce_weight"),
        ({"weight": float("nan")}, "objective.weight"),
        ({"weight": 0.0}, "nothing is learnt"),
        ({"hidden_layers": ((0, 0),), "hidden_weight": 0.0}, "hidden_weight"),
        ({"teacher": "stored", "divergence": "uld"}, "divergence=uld"),
        ({"teacher": "stored", "hidden_layers": ((0, 0),)}, "hidden_layers"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Distil(**settings)
