"""A policy beside itself as the run began: one step against both models' plain logits, in packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import peft
from jaxft.core import tree
from jaxft.models import decoder, heads
from jaxft.models.divergences import Divergence
from jaxft.objectives import OBJECTIVES, SFT
from jaxft.rollout import anchored
from jaxft.training import optim, state, step
from jaxft.training.config import OptimConfig
from tests.rollout.test_distil import STUDENT, Host, rows

RATE, WEIGHT = 0.1, 0.4


def parts(method):
    host = Host(STUDENT, 0)
    params = peft.adapt(host, jax.random.key(2), method)
    mask = tree.trainable_mask(params, peft.method_of(method).select(method))
    return host.config, *tree.partition(params, mask)


def begin(config, trainable, frozen, objective, moved=0.05):
    """(the step, a state that has moved from its start)"""
    settings = OptimConfig(name="sgd", lr=RATE, betas=(0.0, 0.0), schedule="constant", warmup_steps=0, clip_norm=None)
    optimizer = optim.make(settings, trainable, 10)
    asked = OBJECTIVES["sft"].asked(objective)
    score = anchored.make_score(
        config, Divergence(objective.kl_divergence), asked.needs, reports=asked.reports, dtype=jnp.float32
    )
    first = state.create(trainable, optimizer, jax.random.key(1), reference="start" in asked.views)
    first = first._replace(trainable=jax.tree.map(lambda a: a + moved, trainable))
    return step.make_step(OBJECTIVES["sft"], objective, score, optimizer), first


def log_softmax(config, params, batch):
    """[B, T, V], of the token after each place."""
    hidden, _, _ = decoder.forward(config, params, *(batch[n] for n in ("tokens", "positions", "segments")))
    return jax.nn.log_softmax(heads.logits(config, heads.head_of(config, params), hidden))


def dense(config, trainable, start, frozen, batch, reverse):
    """(nll, KL), means over targets, by their definitions."""
    s, t = (log_softmax(config, tree.combine(part, frozen), batch) for part in (trainable, start))
    p, q = (s, t) if reverse else (t, s)
    kl = jnp.sum(jnp.exp(p) * (p - q), -1)
    nll = -jnp.take_along_axis(s, jnp.roll(batch["tokens"], -1, 1)[..., None], -1)[..., 0]
    mask = batch["loss_mask"]
    return [jnp.sum(jnp.where(mask, jnp.roll(x, 1, 1), 0.0)) / mask.sum() for x in (nll, kl)]


@pytest.mark.parametrize(
    "method, divergence", [(peft.LoRA(rank=2), "forward_kl"), (peft.Full(), "reverse_kl")], ids=["lora", "full"]
)
def test_a_step_goes_down_the_loss_and_the_divergence(method, divergence):
    config, trainable, frozen = parts(method)
    run, first = begin(config, trainable, frozen, SFT(kl_to_start=WEIGHT, kl_divergence=divergence))
    batch, kept = rows(), jax.tree.map(np.asarray, first.trainable)

    @jax.jit
    def loss(now):
        nll, kl = dense(config, now, trainable, frozen, batch, divergence == "reverse_kl")
        return nll + WEIGHT * kl, (nll, kl)

    (value, (nll, kl)), grads = jax.value_and_grad(loss, has_aux=True)(first.trainable)
    after, metrics = run(first, frozen, jax.tree.map(lambda a: a[:, None], batch))
    assert float(kl) > 0.01
    for name, want in {"loss": value, "nll": nll, "kl_to_start": kl, "loss/kl_to_start": WEIGHT * kl}.items():
        np.testing.assert_allclose(metrics[name], want, rtol=2e-5, err_msg=name)
    for (path, got), (_, p), (_, g) in zip(*map(tree.paths, (after.trainable, kept, grads)), strict=True):
        np.testing.assert_allclose((p - got) / RATE, g, rtol=1e-3, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("method", [peft.LoRA(rank=2), peft.PromptTuning(tokens=2)], ids=["lora", "prompt"])
def test_at_the_start_there_is_no_divergence(method):
    """A learnt prompt is part of what the start says."""
    config, trainable, frozen = parts(method)
    run, first = begin(config, trainable, frozen, SFT(kl_to_start=WEIGHT), moved=0.0)
    if isinstance(method, peft.PromptTuning):
        batch = rows(((7, 7), (9, 5)))
        batch["loss_mask"] &= batch["positions"] > 2
    else:
        batch = rows()
    after, metrics = run(first, frozen, jax.tree.map(lambda a: a[None], batch))
    np.testing.assert_allclose(metrics["kl_to_start"], 0.0, atol=1e-6)
    _, metrics = run(after, frozen, jax.tree.map(lambda a: a[None], batch))
    assert float(metrics["kl_to_start"]) > 1e-6


def test_refusals():
    with pytest.raises(ValueError, match=r"objective.kl_to_start: got -1"):
        SFT(kl_to_start=-1)
    config, _, _ = parts(peft.LoRA(rank=2))
    with pytest.raises(ValueError, match="'reference'; expected policy or start"):
        anchored.make_score(config, Divergence(), dtype=jnp.float32)("reference", {}, rows())
