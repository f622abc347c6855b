"""Process rewards: torch's cross-entropy of two classes, at the ends of steps and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft.objectives import OBJECTIVES, PRM, prm, terms

ROW = OBJECTIVES["prm"]
NAN = float("nan")
# Two solutions in the first row, of three steps and of one; one of two in the second. Steps end at these places.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
ENDS = {
    (0, 1): (1.2, True),
    (0, 2): (-0.4, True),
    (0, 4): (-2.0, False),
    (0, 6): (0.3, False),
    (1, 2): (0.9, True),
    (1, 5): (-0.7, True),
}
LAST = [(0, 4), (0, 6), (1, 5)]


def rows():
    """(scores, batch), with NaN where no step ends."""
    said, mask, label = np.full(SEGMENTS.shape, NAN, np.float32), SEGMENTS < 0, SEGMENTS < 0
    for at, (score, right) in ENDS.items():
        said[at], mask[at], label[at] = score, True, right
    batch = {"segments": SEGMENTS, "step_mask": mask, "step_label": label}
    return {"policy": {"reward": jnp.asarray(said)}}, jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("last", [False, True], ids=["every step", "last step"])
def test_loss_and_gradient_are_torchs_of_two_classes(last):
    """The logits of wrong and right are 0 and s."""
    scores, batch = rows()
    places = LAST if last else list(ENDS)
    said = torch.tensor([ENDS[at][0] for at in places], requires_grad=True)
    logits = torch.stack([torch.zeros_like(said), said], -1)
    want = torch.nn.functional.cross_entropy(logits, torch.tensor([int(ENDS[at][1]) for at in places]))
    want.backward()

    def fn(x):
        return terms.values(ROW.fn(PRM(train_on_last_step_only=last), {"policy": {"reward": x}}, batch, {})[0])["prm"]

    value, grad = jax.value_and_grad(fn)(scores["policy"]["reward"])
    assert float(value) == pytest.approx(want.item(), rel=1e-6)
    np.testing.assert_allclose([grad[at] for at in places], np.asarray(said.grad), rtol=1e-5)
    assert np.count_nonzero(grad) == len(places)


def test_metrics_are_of_all_steps():
    """Right: 1.2 and 0.9 of the four right ones, -2.0 of the two wrong ones."""
    scores, batch = rows()
    _, metrics = ROW.fn(PRM(train_on_last_step_only=True), scores, batch, {})
    found = {name: float(x) for name, x in terms.values(metrics).items()}
    brier = np.mean([(1 / (1 + np.exp(-s)) - right) ** 2 for s, right in ENDS.values()])
    want = {"accuracy": 3 / 6, "accuracy/right": 2 / 4, "accuracy/wrong": 1 / 2, "brier": brier}
    assert found == pytest.approx(want, rel=1e-6)


def test_last_steps():
    _, batch = rows()
    found = np.asarray(prm.last_steps(batch) & batch["step_mask"])
    assert [tuple(at) for at in np.argwhere(found).tolist()] == LAST
