r"""CPO, SimPO and AlphaPO: preferences without a reference.

.. math:: L = \frac{1}{|P|} \sum_{p \in P} -\log \sigma\left( \beta (R(y_w) - R(y_l)) - \gamma \right)
              - \frac{a}{N} \sum_t \log p_t

- CPO: R is the log-probability of a completion (sum over tokens), γ is 0, and the second term, of weight a = cpo_alpha,
  is the mean over the chosen completions' tokens: Xu et al. 2024, eq. 3 (arXiv:2401.08417).
- SimPO: R is the mean over a completion's tokens, γ = simpo_gamma, a = 0: Meng et al. 2024, eq. 6 (arXiv:2405.14734).
- AlphaPO: R = (1 - P^-α) / α of P = exp of the R above: Gupta et al. 2025 (arXiv:2501.03884).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import divergences, preference, sequences, terms
from jaxft.objectives.sequences import Pair
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores

LossType = Literal["sigmoid", "hinge", "ipo", "simpo"]


@dataclass(frozen=True)
class CPO:
    """Contrastive preference optimisation: preferences and fine-tuning on the chosen, without a reference."""

    loss: LossType = "sigmoid"
    """Loss of a pair: sigmoid, hinge, or of means over tokens ipo and simpo."""
    beta: float = 0.1
    """Scale of log-probabilities in the loss; SimPO's paper has 2 to 2.5. 1/2β is the difference that ipo draws to."""
    cpo_alpha: float = 1.0
    """Weight of the likelihood of the chosen."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong, in sigmoid and simpo."""
    simpo_gamma: float = 0.5
    """Margin by which the chosen's reward is to be higher, in simpo."""
    alpha: float = 0.0
    """AlphaPO's shape of the reward, 0.25 in its paper; 0 is the logarithm."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"objective.beta: got {self.beta}; expected a number above 0")
        if not self.cpo_alpha >= 0:
            raise ValueError(f"objective.cpo_alpha: got {self.cpo_alpha}; expected at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"objective.label_smoothing: got {self.label_smoothing}; expected from 0 to below 1")
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise ValueError(
                f"objective.label_smoothing: got {self.label_smoothing}, which {self.loss} makes no use of; it is an "
                "option of sigmoid and simpo"
            )
        if self.simpo_gamma != 0.5 and self.loss != "simpo":
            raise ValueError(
                f"objective.simpo_gamma: got {self.simpo_gamma}, which {self.loss} makes no use of; it is an "
                "option of simpo"
            )


@dataclass(frozen=True)
class SimPO(CPO):
    """Simple preference optimisation: means over tokens, a margin, no reference; AlphaPO with alpha."""

    loss: Literal["simpo"] = "simpo"
    """Loss of a pair."""
    cpo_alpha: float = 0.0
    """Weight of the likelihood of the chosen."""


def cpo(config: CPO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over pairs (a term of the loss's name) and, with ``cpo_alpha``, over tokens of the chosen (``nll``); nats.

    Args:
      scores: ``policy`` with ``logp`` float32[B, T]; if there, ``correct`` and ``entropy``.
      batch: see `sequences`.

    Returns these terms and the metrics ``nll_loss`` and those of `sequences.pair_metrics`, whose rewards are βR and
    whose logps are means over tokens in ipo and simpo."""
    del carry
    logp_BT, keep = scores["policy"]["logp"], sequences.pair_mask(batch)
    logp = sequences.sums(logp_BT, batch)
    if config.loss in ("ipo", "simpo"):
        logp = logp / jnp.maximum(sequences.lengths(batch), 1.0)
    logp = sequences.pairs(logp)
    reward = Pair(*(divergences.power(each, -config.alpha) for each in logp))
    losses = {config.loss: terms.masked(pair_loss(config, reward.chosen - reward.rejected), keep)}
    nll = terms.masked(-logp_BT, sequences.chosen_tokens(batch))
    if config.cpo_alpha:
        losses["nll"] = Mean(config.cpo_alpha * nll.total, nll.weight)
    metrics = sequences.pair_metrics(Pair(*(config.beta * each for each in reward)), logp, scores, batch)
    return losses, metrics | sequences.detached({"nll_loss": nll})


def pair_loss(config: CPO, delta: jax.Array) -> jax.Array:
    """Loss of each difference of rewards R, before β; float32, of any shape."""
    if config.loss == "hinge":
        return jax.nn.relu(1 - config.beta * delta)
    if config.loss == "ipo":
        return preference.squared(delta - 1 / (2 * config.beta))
    gamma = config.simpo_gamma if config.loss == "simpo" else 0.0
    return preference.smoothed(config.beta * delta - gamma, config.label_smoothing)
