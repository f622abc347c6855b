"""What holds parameters near their start: the gradient of the penalised loss, apart from the loss; F by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint import state as disk
from jaxft.checkpoint.state import Record
from jaxft.core import tree
from jaxft.objectives import DPO, OBJECTIVES, SFT
from jaxft.training import fisher, optim, state, step, sweep
from jaxft.training.config import OptimConfig
from tests.training import tiny

RATE, L2, EWC = 0.1, 0.3, 0.7
CONFIG = OptimConfig(
    name="sgd", lr=RATE, betas=(0.0, 0.0), schedule="constant", warmup_steps=0, clip_norm=None,
    l2_start=L2, ewc=EWC, ewc_data="old.jsonl",
)  # fmt: skip


def weights(trainable):
    """As Fisher information: not negative, another number for every parameter."""
    keys = jax.random.split(jax.random.key(5), 99)
    leaves, treedef = jax.tree.flatten(trainable)
    return treedef.unflatten([jnp.square(jax.random.normal(k, a.shape)) for k, a in zip(keys, leaves, strict=False)])


def begin(config=CONFIG, add=0.1):
    """(a state that has moved by ``add``, frozen, the optimiser)"""
    trainable, frozen = tiny.parts(jax.random.key(0))
    optimizer = optim.make(config, trainable, 10)
    first = state.create(trainable, optimizer, jax.random.key(1), fisher=weights(trainable) if config.ewc else None)
    return first._replace(trainable=jax.tree.map(lambda a: a + add, trainable)), frozen, optimizer


def penalised(params, start, weight):
    """Both penalties, written out."""
    flat = [np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(t)]) for t in (params, start)]
    moved = (flat[0] - flat[1]) ** 2
    weight = np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(weight)])
    return 0.5 * L2 * moved.sum(), 0.5 * EWC * (weight * moved).sum()


def nll(trainable, frozen, batch):
    logp = tiny.score("policy", tree.combine(trainable, frozen), batch)["logp"]
    return -jnp.sum(jnp.where(batch["loss_mask"], logp, 0.0)) / batch["loss_mask"].sum()


def test_a_step_goes_down_the_penalised_loss_and_reports_the_plain_one():
    now, frozen, optimizer = begin()
    kept = jax.tree.map(np.asarray, now._replace(key=jax.random.key_data(now.key)))
    batch = tiny.batch(0)
    value, grads = jax.value_and_grad(nll)(now.trainable, frozen, batch)
    expected = jax.tree.map(
        lambda p, g, s, f: p - RATE * (g + (L2 + EWC * f) * (p - s)), kept.trainable, grads, kept.start, kept.fisher
    )
    after, metrics = step.make_step(OBJECTIVES["sft"], SFT(), tiny.score, optimizer)(now, frozen, tiny.micro(batch, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.trainable, expected)
    jax.tree.map(np.testing.assert_array_equal, (after.start, after.fisher), (kept.start, kept.fisher))
    l2, ewc = penalised(kept.trainable, kept.start, kept.fisher)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose([metrics["penalty/l2_start"], metrics["penalty/ewc"]], [l2, ewc], rtol=1e-5)


def test_members_of_a_sweep_are_held_each_by_its_own_start():
    config = OptimConfig(**{**vars(CONFIG), "ewc": 0.0, "ewc_data": None})
    runs = [begin(config, add) for add in (0.1, -0.2)]
    (one, frozen, optimizer), (two, _, _) = runs
    both = jax.tree.map(lambda *a: jnp.stack(a), one, two)
    axes = tree.combine(jax.tree.map(lambda a: 0, one.trainable), jax.tree.map(lambda a: None, frozen))

    def score(view, params, batch, key=None):
        own = (axes, 0, None if key is None else 0)
        return jax.vmap(lambda p, b, k: tiny.score(view, p, b, k), in_axes=own)(params, batch, key)

    made = sweep.make_optimizer(config, one.trainable, [RATE, RATE], 10)
    batch = tiny.micro(tiny.batch(0), 1)
    after, metrics = sweep.make_step(OBJECTIVES["sft"], SFT(), score, made, 2)(both, frozen, batch)
    alone = [step.make_step(OBJECTIVES["sft"], SFT(), tiny.score, optimizer)(s, frozen, batch) for s in (one, two)]
    for i, (expected, values) in enumerate(alone):
        np.testing.assert_allclose(metrics["penalty/l2_start"][i], values["penalty/l2_start"], rtol=1e-5)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            after.trainable, expected.trainable,
        )  # fmt: skip


def test_a_start_that_moves_and_a_missing_measurement_are_refused():
    now, frozen, optimizer = begin()
    with pytest.raises(ValueError, match=r"l2_start.*reference moves"):
        step.make_step(OBJECTIVES["dpo"], DPO(ref_sync_steps=2), tiny.score, optimizer)
    with pytest.raises(ValueError, match=r"optim.ewc: the state holds no Fisher"):
        run = step.make_step(OBJECTIVES["sft"], SFT(), tiny.score, optimizer)
        run(now._replace(fisher=None), frozen, tiny.micro(tiny.batch(0), 1))
    for wrong in ({"ewc": 1.0}, {"ewc_data": "old.jsonl"}):
        with pytest.raises(ValueError, match=r"optim.ewc: got .* expected both"):
            OptimConfig(**wrong)


def test_start_and_fisher_are_saved_with_the_state(tmp_path):
    now, _, _ = begin()
    with disk.open_folder(tmp_path) as manager:
        disk.save(manager, 1, now, Record({}, {}))
        other = begin(add=0.5)[0]._replace(fisher=jax.tree.map(jnp.zeros_like, now.fisher))
        back, _ = disk.restore(manager, other, Record({}, {}))
    for name in ("trainable", "start", "fisher"):
        jax.tree.map(np.testing.assert_array_equal, getattr(back, name), getattr(now, name))


def documents(batch):
    """Batches of one row."""
    return [{name: a[i : i + 1] for name, a in batch.items()} for i in range(len(batch["tokens"]))]


@pytest.mark.parametrize("select", [None, "full"], ids=["lora", "full"])
def test_fisher_is_the_sum_of_squares_of_whole_documents_gradients(select):
    """Against the Jacobian of all tokens' log-probabilities, whatever rows stand beside a document."""
    trainable, frozen = tiny.parts(jax.random.key(0), select=select)
    batch = tiny.batch(3, rows=5)
    each = jax.jacrev(lambda t: tiny.score("policy", tree.combine(t, frozen), batch)["logp"])(trainable)

    def dense(jacobian):
        jacobian = np.asarray(jacobian, np.float64)
        keep = batch["loss_mask"].reshape(*batch["loss_mask"].shape, *[1] * (jacobian.ndim - 2))
        return (np.where(keep, jacobian, 0).sum(1) ** 2).sum(0) / batch["loss_mask"].sum()

    for width in (1, 4):
        found = fisher.estimate(tiny.score, trainable, frozen, documents(batch), jax.device_put, width)
        jax.tree.map(lambda f, j: np.testing.assert_allclose(f, dense(j), rtol=1e-4, atol=1e-8), found, each)


def test_fisher_of_a_softmax_is_its_curvature():
    """Tokens drawn as the model says: p (1 - p), which is the second derivative of the loss of a token."""
    p = np.array([0.5, 0.25, 0.125, 0.125])
    tokens = np.array([[0], [0], [0], [0], [1], [1], [2], [3]], np.int32)
    batch = {"tokens": tokens, "loss_mask": np.ones(tokens.shape, bool)}

    def score(view, params, batch, key=None):
        return {"logp": jax.nn.log_softmax(params["logits"])[batch["tokens"]]}

    found = fisher.estimate(score, {"logits": jnp.log(p)}, {"logits": None}, documents(batch), jax.device_put)
    np.testing.assert_allclose(found["logits"], p * (1 - p), rtol=1e-5)
    with pytest.raises(ValueError, match="no token to learn"):
        fisher.estimate(score, {"logits": jnp.log(p)}, {"logits": None}, [], jax.device_put)
