"""Learning-rate schedules, by hand."""

import jax.numpy as jnp
import pytest

from jaxft.training import schedules


def rates(name, total=10, warmup=2, **more):
    return [float(schedules.make(name, 1.0, total, warmup, **more)(jnp.int32(i))) for i in range(total + 1)]


def test_warmup_starts_above_zero_and_reaches_the_peak():
    assert rates("constant", total=6, warmup=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear():
    assert rates("linear")[2:] == pytest.approx([1 - i / 8 for i in range(9)])


def test_cosine_halfway_is_half_and_the_end_is_the_minimum():
    got = rates("cosine")
    assert got[6] == pytest.approx(0.5) and got[10] == pytest.approx(0.0, abs=1e-7)
    assert rates("cosine", minimum=0.1)[10] == pytest.approx(0.1)


def test_wsd_is_stable_then_falls_over_the_last_steps():
    """Of 10 steps the last 4 decay as 1 - sqrt(i / 4)."""
    want = [1.0] * 5 + [1 - (i / 4) ** 0.5 for i in range(1, 5)]
    assert rates("wsd", decay_ratio=0.4)[2:] == pytest.approx(want, abs=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="expected one of cosine, linear, constant, wsd"):
        schedules.make("cos", 1.0, 10, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optim.warmup_steps: got 20 with 10 steps"):
        schedules.make("cosine", 1.0, 10, 20)
