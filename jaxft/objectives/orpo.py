r"""ORPO: fine-tuning on the chosen and a penalty on the odds of the rejected, without a reference.

.. math:: L = -\frac{1}{N} \sum_t \log p_t - \frac{\beta}{|P|} \sum_{p \in P} \log \sigma\left(
              \log \frac{\text{odds}(y_w)}{\text{odds}(y_l)} \right), \qquad
          \text{odds}(y) = \frac{P(y)}{1 - P(y)}, \quad \log P(y) = \frac{1}{|y|} \log \pi(y|x)

Hong et al. 2024, eq. 4, 6 and 7, whose λ is β (arXiv:2403.07691). The first mean is over the tokens t of the chosen
sequences, prompts too.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.objectives import sequences, terms
from jaxft.objectives.sequences import Pair
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores

LIKELIEST = -1e-7
"""Where mean log-probabilities end, about float32's last step below probability 1, whose odds are infinite."""


@dataclass(frozen=True)
class ORPO:
    """Odds-ratio preference optimisation: fine-tuning and preferences in one stage, without a reference."""

    beta: float = 0.1
    """Weight of the odds ratio beside the likelihood of the chosen."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"objective.beta: got {self.beta}; expected a number above 0")


def log_odds(logp: jax.Array) -> jax.Array:
    """``log(P / (1 - P))`` of ``log P``, float32 of any shape."""
    logp = jnp.minimum(logp, LIKELIEST)
    halved = -0.6931472  # log(1 - P) loses digits in one form above P = 1/2, in the other below
    low, high = jnp.minimum(logp, halved), jnp.maximum(logp, halved)
    return logp - jnp.where(logp < halved, jnp.log1p(-jnp.exp(low)), jnp.log(-jnp.expm1(high)))


def orpo(config: ORPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over tokens (``nll``) and over pairs (``odds_ratio``); nats.

    Args:
      scores: ``policy`` with ``logp`` float32[B, T]; if there, ``correct`` and ``entropy``.
      batch: see `sequences`.

    Returns these terms and the metrics ``nll_loss``, ``log_odds_ratio`` (mean of log σ of the log odds ratio),
    ``log_odds_chosen`` (mean log odds ratio) and those of `sequences.pair_metrics`, of means over tokens."""
    del carry
    logp_BT, keep = scores["policy"]["logp"], sequences.pair_mask(batch)
    mean = sequences.pairs(sequences.sums(logp_BT, batch) / jnp.maximum(sequences.lengths(batch), 1.0))
    ratio = log_odds(mean.chosen) - log_odds(mean.rejected)
    log_sigmoid = terms.masked(jax.nn.log_sigmoid(ratio), keep)
    nll = terms.masked(-logp_BT, whole_chosen(batch))
    metrics = {"nll_loss": nll, "log_odds_ratio": log_sigmoid, "log_odds_chosen": terms.masked(ratio, keep)}
    rewards = Pair(config.beta * mean.chosen, config.beta * mean.rejected)
    losses = {"nll": nll, "odds_ratio": Mean(-config.beta * log_sigmoid.total, log_sigmoid.weight)}
    return losses, sequences.detached(metrics) | sequences.pair_metrics(rewards, mean, scores, batch)


def whole_chosen(batch: Batch) -> jax.Array:
    """bool[B, T]: the token is of a chosen sequence, prompt or completion, and follows another of it."""
    segments = batch["segments"]
    follows = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    return follows & (segments % 2 == 1)
