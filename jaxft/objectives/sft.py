r"""Supervised fine-tuning: token-mean cross-entropy over the tokens that carry loss.

.. math:: L = \frac{\sum_t m_t\, \ell_t}{\sum_t m_t}, \qquad \ell_t = -\log p_t \ \text{(nll)} \quad \text{or} \quad
          \ell_t = -\mathrm{sg}(p_t) \log p_t \ \text{(dft)}

The mean is over all target tokens of the optimiser step, whatever row, micro-batch or device they are in. ``dft``
("dynamic fine-tuning") rescales each token by its own probability, which cancels the inverse-probability weight that
makes the gradient of cross-entropy a badly scaled policy gradient: Wu et al. 2025, eq. 9 (arXiv:2508.05629).

``kl_to_start`` adds that times the mean over the same tokens of the divergence, over the whole vocabulary, from the
model as the run began: learning without forgetting, Li & Hoiem 2016 (arXiv:1606.09282), with the recorded answers of
the old model recomputed in each step.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import terms
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning on the tokens the data marks as targets."""

    loss: Literal["nll", "dft"] = "nll"
    """Loss of one token: ``nll`` (cross-entropy) or ``dft`` (cross-entropy times the token's own probability)."""
    kl_to_start: float = 0.0
    """Weight of the divergence from the model as the run began, on the target tokens: what is learnt then costs less of
    what it knew. 0: none; otherwise each step has one more forward pass."""
    kl_divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """Of ``kl_to_start``: KL(start, policy) keeps all that the start would say, KL(policy, start) forbids what it would
    not."""

    kl_sources: tuple[int, ...] = ()
    """Sources of a mixture (``data.sources``, numbered from 0 in their order) on whose tokens alone ``kl_to_start``
    counts, such as one of general text. None: all."""

    def __post_init__(self) -> None:
        if not 0 <= self.kl_to_start < float("inf"):
            raise ValueError(f"objective.kl_to_start: got {self.kl_to_start}; expected a finite number, 0 or more")
        if self.kl_sources and (not self.kl_to_start or min(self.kl_sources) < 0):
            got = f"{list(self.kl_sources)} with kl_to_start={self.kl_to_start}"
            raise ValueError(f"objective.kl_sources: got {got}; expected numbers from 0 on, and a weight above 0")


def needs(config: SFT) -> tuple[str, ...]:
    """What is differentiated."""
    return ("logp", "divergence") if config.kl_to_start else ("logp",)


def views(config: SFT) -> tuple[str, ...]:
    """The start is scored first: the policy is compared with what it said."""
    return ("start", "policy") if config.kl_to_start else ("policy",)


def token_loss(config: SFT, logp: jax.Array) -> jax.Array:
    """Loss of each token, not reduced; nats. ``logp``: float32[B, T]."""
    if config.loss == "dft":
        return -jax.lax.stop_gradient(jnp.exp(logp)) * logp
    return -logp


def sft(config: SFT, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over target tokens; nats.

    Args:
      scores: ``policy`` with ``logp`` float32[B, T], log p(tokens[t] | what precedes it in its document), and for
        ``kl_to_start`` ``divergence`` (nats); if there, ``correct`` (the most likely token was the right one) and
        ``entropy`` (nats), also [B, T].
      batch: ``loss_mask`` bool[B, T], True where the token is a target; with ``kl_sources``, ``source`` int32[B].

    Returns the terms ``sft`` and ``kl_to_start`` (times its weight), and the metrics ``nll``, ``kl_to_start``,
    ``mean_token_accuracy`` and ``entropy``.
    """
    del carry
    policy, targets_BT = scores["policy"], batch["loss_mask"]
    logp_BT = policy["logp"]
    metrics: dict[str, Mean] = {"nll": terms.masked(-jax.lax.stop_gradient(logp_BT), targets_BT)}
    if "correct" in policy:
        metrics["mean_token_accuracy"] = terms.masked(policy["correct"].astype(jnp.float32), targets_BT)
    if "entropy" in policy:
        metrics["entropy"] = terms.masked(jax.lax.stop_gradient(policy["entropy"]), targets_BT)
    losses = {"sft": terms.masked(token_loss(config, logp_BT), targets_BT)}
    if config.kl_to_start:
        kl = terms.masked(policy["divergence"], targets_BT & _held(config, batch))
        losses["kl_to_start"] = Mean(config.kl_to_start * kl.total, kl.weight)
        metrics["kl_to_start"] = Mean(jax.lax.stop_gradient(kl.total), kl.weight)
    return losses, metrics


def _held(config: SFT, batch: Batch) -> jax.Array:
    """bool[B or 1, 1]: the rows on which the divergence from the start counts. Raises ValueError without a mixture."""
    if not config.kl_sources:
        return jnp.ones((1, 1), bool)
    if "source" not in batch:
        raise ValueError("objective.kl_sources: the rows are of no mixture; give data.sources, or leave it out")
    return jnp.isin(batch["source"], jnp.array(config.kl_sources))[:, None]
