"""DPO over a batch: trl's numbers token by token, whatever the layout, the padding and the micro-batches."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import DPO, OBJECTIVES, dpo, terms
from jaxft.objectives.preference import LOSSES
from jaxft.objectives.terms import Follow
from tests.objectives import completions, trl_reference
from tests.objectives.whole import annotated, part_of, total, with_logp

ROW = OBJECTIVES["dpo"]


SETTINGS = [
    {"loss": ("sigmoid",)},
    {"loss": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.5)},
    {"loss": ("aot", "aot_unpaired", "ipo"), "loss_weights": (1.0, 0.5, 2.0), "label_smoothing": 0.1},
    {"loss": ("hinge", "sigmoid_norm"), "ld_alpha": 0.3},
    {"loss": ("sigmoid", "aot"), "ld_alpha": 0.0},
    {"loss": ("robust", "sppo_hard"), "label_smoothing": 0.2, "use_weighting": True},
    {"loss": ("exo_pair", "sft"), "label_smoothing": 1e-3, "f_divergence_type": "js_divergence"},
    {
        "loss": ("discopop",),
        "discopop_tau": 0.3,
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 1.1,
    },
]


@pytest.mark.parametrize("a_row", [2, 4])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s["loss"]))
def test_loss_gradient_and_metrics_are_those_of_trl(settings, a_row):
    """One pair a row and two, with padding of NaN and room for two sequences that are not there."""
    given = completions.draw(16, seed=1)
    told = {"loss_weights": [1.0] * len(settings["loss"]), "beta": 0.3} | settings
    want, want_grad, want_metrics = trl_reference.dpo(given, **told)
    scores, batch = completions.rows(given, a_row, pad=3, room=2)
    value, grad, metrics = total(ROW, DPO(beta=0.3, **settings), scores, batch)
    assert value == pytest.approx(want, rel=2e-5)
    scale = np.abs(want_grad).max()
    np.testing.assert_allclose(
        completions.back(np.asarray(grad), given, a_row), want_grad, rtol=1e-4, atol=2e-5 * scale
    )
    for name, number in metrics.items():
        assert number == pytest.approx(want_metrics[name], rel=2e-5), name
    assert set(metrics) == {
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
        "entropy", "mean_token_accuracy",
    }  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s["loss"]))
def test_micro_batches_add_up_to_the_batch(settings):
    """Sums and weights of the parts, annotated as a whole, are those of the whole, and so are gradients."""
    config = DPO(beta=0.3, **settings)
    scores, batch = completions.rows(completions.draw(16, seed=2))
    value, grad, _ = total(ROW, config, scores, batch)
    whole, _ = annotated(ROW, config, scores, batch, {})

    def fn(logp):
        now = with_logp(scores, logp)
        found = [part_of(ROW, config, now, whole, {}, *part)[0] for part in ((0, 3), (3, 4), (4, 8))]
        return sum(terms.values(terms.add(found[0], terms.add(found[1], found[2]))).values())

    got, got_grad = jax.jit(jax.value_and_grad(fn))(scores["policy"]["logp"])
    assert float(got) == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(got_grad, grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s["loss"]))
def test_weights_depend_on_the_batch_alone(settings):
    config = DPO(**settings)
    scores, batch = completions.rows(completions.draw(8, seed=2))
    zeros = jax.tree.map(jnp.zeros_like, scores)
    found = [
        jax.jit(ROW.fn, static_argnums=0)(config, s, annotated(ROW, config, s, batch, {})[0], {})[0]
        for s in (scores, zeros)
    ]
    for a, b in zip(*(means.values() for means in found), strict=True):
        assert float(a.weight) == float(b.weight) > 0


def test_matches_are_across_the_whole_batch():
    """Log-ratios 3, 1, 2 of the policy and 10, 30, 20 of the reference: 3 meets 30, 1 meets 10, 2 meets 20; a pair that
    does not exist meets none."""
    keep = jnp.array([[True, True], [True, False]])
    own, others = jnp.array([[3.0, 1.0], [2.0, jnp.nan]]), jnp.array([[10.0, 30.0], [20.0, -5.0]])
    np.testing.assert_array_equal(dpo.partners(own, others, keep), [[30.0, 10.0], [20.0, 0.0]])


def test_tokens_of_the_longer_completion_count_less_by_hand():
    """Completions of 3 tokens (-1, -2, -4) and of 1 (-8): the chosen is -1 + 0.5 (-2 - 4) = -4."""
    batch = {
        "segments": jnp.array([[1, 1, 1, 1, 2, 2, 0]]),
        "loss_mask": jnp.array([[False, True, True, True, False, True, False]]),
        "sequence_mask": jnp.array([[True, True]]),
    }
    scores = {"policy": {"logp": jnp.array([[0.0, -1.0, -2.0, -4.0, 0.0, -8.0, jnp.nan]])}}
    logp, ref = dpo.log_probs(DPO(ld_alpha=0.5, reference_free=True), scores, batch)
    assert (float(logp.chosen[0, 0]), float(logp.rejected[0, 0])) == (-4.0, -8.0)
    assert float(ref.chosen[0, 0]) == float(ref.rejected[0, 0]) == 0.0


def test_what_it_asks_for():
    assert ROW.asked(DPO()) == (("logp",), ("correct", "entropy"), ("policy", "reference"), (), ())
    assert ROW.asked(DPO(reference_free=True, use_weighting=True))[:3] == (
        ("logp", "sum_p2"), ("correct", "entropy"), ("policy",),
    )  # fmt: skip
    assert ROW.rows == "pairs"
    assert ROW.annotation(DPO(loss=("sigmoid", "sft"))) is None and ROW.annotation(DPO(loss="aot")) is not None
    assert ROW.follow(DPO()) is None and ROW.follow(DPO(ref_sync_steps=512)) == Follow(0.6, 512)


def test_every_loss_can_be_asked_for():
    assert typing.get_args(dpo.LossType) == tuple(LOSSES)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": ()}, r"objective.loss: got \[\]"),
        ({"loss": ("ipo", "ipo")}, r"objective.loss: got \['ipo', 'ipo'\]"),
        ({"loss_weights": (1.0, 2.0)}, r"objective.loss_weights: got \[1.0, 2.0\]; expected 1"),
        ({"loss_weights": (0.0,)}, r"objective.loss_weights: got \[0.0\]"),
        ({"beta": 0.0}, r"objective.beta: got 0.0"),
        ({"label_smoothing": 0.1}, r"objective.label_smoothing: got 0.1, which sigmoid makes no use of.*robust"),
        ({"discopop_tau": 0.1}, r"objective.discopop_tau.*discopop"),
        ({"loss": "discopop", "discopop_tau": 0.0}, r"objective.discopop_tau: got 0.0; expected a number above 0"),
        ({"loss": "exo_pair"}, r"objective.label_smoothing: got 0.0; exo_pair"),
        ({"loss": "robust", "label_smoothing": 0.5}, r"objective.label_smoothing: got 0.5.*below 0.5"),
        ({"loss": "nca_pair", "f_divergence_type": "forward_kl"}, r"objective.f_divergence_type.*nca_pair.*sigmoid"),
        ({"f_alpha_divergence_coef": 0.3}, r"objective.f_alpha_divergence_coef: got 0.3.*alpha_divergence"),
        ({"ld_alpha": 1.5}, r"objective.ld_alpha"),
        ({"loss": ("aot", "sft"), "use_weighting": True}, r"objective.use_weighting: got true with aot, sft"),
        ({"ref_sync_steps": 0}, r"objective.ref_sync_steps: got 0"),
        ({"ref_sync_steps": 9, "reference_free": True}, r"objective.ref_sync_steps: got reference_free"),
        ({"ref_mixup": 0.0}, r"objective.ref_mixup"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPO(**settings)
