"""The SFT objective: hand arithmetic, and what must not change it."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxft.objectives import OBJECTIVES, SFT, sft, terms

LOGP = jnp.log(jnp.array([[0.5, 0.25, 0.125], [0.2, 0.1, 0.9]], jnp.float32))
MASK = jnp.array([[False, True, True], [True, False, False]])


def run(config=SFT(), logp=LOGP, mask=MASK, **more):  # noqa: B008  (frozen)
    return sft.sft(config, {"policy": {"logp": logp, **more}}, {"loss_mask": mask}, {})


def test_nll_by_hand():
    """Targets have p = 1/4, 1/8, 1/5: total = ln 4 + ln 8 + ln 5 = ln 160 = 5.0752, weight 3."""
    losses, metrics = run()
    assert float(losses["sft"].total) == pytest.approx(math.log(160), rel=1e-6)
    assert float(losses["sft"].weight) == 3.0
    assert float(metrics["nll"].total) == float(losses["sft"].total)


def test_dft_by_hand():
    """Each term times its probability: ln 4 / 4 + ln 8 / 8 + ln 5 / 5 = 0.34657 + 0.25993 + 0.32189 = 0.92839.

    The probability is a constant of the gradient, so d/dlogp = -p at targets."""
    losses, metrics = run(SFT(loss="dft"))
    assert float(losses["sft"].total) == pytest.approx(math.log(4) / 4 + math.log(8) / 8 + math.log(5) / 5, rel=1e-6)
    assert float(metrics["nll"].total) == pytest.approx(math.log(160), rel=1e-6)
    grad = jax.grad(lambda logp: run(SFT(loss="dft"), logp)[0]["sft"].total)(LOGP)
    assert jnp.allclose(grad, jnp.array([[0, -0.25, -0.125], [-0.2, 0, 0]]), atol=1e-7)


def test_metrics_by_hand():
    """Of the targets one of three is right; their entropies 1, 2 and 4 sum to 7."""
    correct = jnp.array([[True, True, False], [False, True, True]])
    entropy = jnp.array([[9.0, 1.0, 2.0], [4.0, 9.0, 9.0]])
    _, metrics = run(correct=correct, entropy=entropy)
    means = terms.values(metrics)
    assert float(means["mean_token_accuracy"]) == pytest.approx(1 / 3)
    assert float(means["entropy"]) == pytest.approx(7 / 3)


def test_divergence_from_the_start_by_hand():
    """Of the targets 1, 2 and 4 nats away from the start: 7 in all, times the weight in the loss."""
    apart = jnp.array([[9.0, 1.0, 2.0], [4.0, jnp.nan, 9.0]])
    losses, metrics = run(SFT(kl_to_start=0.5), divergence=apart)
    assert (float(losses["kl_to_start"].total), float(losses["kl_to_start"].weight)) == (3.5, 3.0)
    assert float(metrics["kl_to_start"].total) == 7.0
    config, scores = SFT(kl_to_start=0.5, kl_sources=(2, 1)), {"policy": {"logp": LOGP, "divergence": apart}}
    losses, _ = sft.sft(config, scores, {"loss_mask": MASK, "source": jnp.array([0, 2])}, {})
    assert (float(losses["kl_to_start"].total), float(losses["kl_to_start"].weight)) == (2.0, 1.0)
    assert float(losses["sft"].weight) == 3.0
    with pytest.raises(ValueError, match="rows are of no mixture"):
        sft.sft(config, scores, {"loss_mask": MASK}, {})
    with pytest.raises(ValueError, match=r"kl_sources: got \[1\] with kl_to_start=0"):
        SFT(kl_sources=(1,))
    assert float(losses["sft"].total) == pytest.approx(math.log(160), rel=1e-6)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_masked_tokens_have_zero_gradient(loss):
    grad = jax.grad(lambda logp: run(SFT(loss=loss), logp)[0]["sft"].total)(LOGP)
    assert bool(jnp.all((grad != 0) == MASK))


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_padding_packing_and_splitting_change_nothing(loss):
    """The same tokens in longer rows, in one row, or row by row give the same sums."""
    want = run(SFT(loss=loss))[0]["sft"]
    padded = run(
        SFT(loss=loss),
        jnp.pad(LOGP, ((0, 1), (0, 2)), constant_values=-99.0),
        jnp.pad(MASK, ((0, 1), (0, 2))),
    )[0]["sft"]
    packed = run(SFT(loss=loss), LOGP.reshape(1, -1), MASK.reshape(1, -1))[0]["sft"]
    rows = [run(SFT(loss=loss), LOGP[i : i + 1], MASK[i : i + 1])[0] for i in range(2)]
    for got in (padded, packed, terms.add(*rows)["sft"]):
        assert float(got.total) == pytest.approx(float(want.total), rel=1e-6)
        assert float(got.weight) == float(want.weight)


def test_the_weight_depends_on_the_batch_alone():
    assert float(run(logp=jnp.zeros_like(LOGP))[0]["sft"].weight) == 3.0


def test_the_table():
    row = OBJECTIVES["sft"]
    assert (row.config, row.fn) == (SFT, sft.sft)
    assert row.asked(SFT())[::2] == (("logp",), ("policy",), ())
    assert row.asked(SFT(kl_to_start=0.1))[::2] == (("logp", "divergence"), ("start", "policy"), ())
