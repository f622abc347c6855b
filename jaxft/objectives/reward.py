r"""Reward modelling from pairs: a scalar that is higher for the chosen completion than for the rejected.

.. math:: L = -\frac{1}{|P|} \sum_{p \in P} \log \sigma(r_w - r_l - m) + \frac{c}{|P|} \sum_{p \in P} (r_w + r_l)^2

Bradley & Terry 1952; Ouyang et al. 2022, eq. 1 (arXiv:2203.02155). The margin m says by how much the chosen is better,
where the data do: Touvron et al. 2023, eq. 2 (arXiv:2307.09288). The loss does not know where zero is; the second term,
with the coefficient c, keeps rewards around it: Eisenstein et al. 2023, section 3 (arXiv:2312.09244).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import calibration, sequences, terms
from jaxft.objectives.sequences import Pair
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores


@dataclass(frozen=True)
class Reward:
    """A reward model from pairs: Bradley-Terry."""

    center_rewards_coefficient: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps their mean at zero; .01 is usual."""
    head: Literal["normal", "zeros"] = "normal"
    """How the head begins that a language model is given: drawn as transformers draws it, or zeros."""

    def __post_init__(self) -> None:
        if not 0 <= self.center_rewards_coefficient < float("inf"):
            got = self.center_rewards_coefficient
            raise ValueError(f"objective.center_rewards_coefficient: got {got}; expected a number, at least 0")


def loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | None = None) -> jax.Array:
    """Bradley-Terry loss of each pair, not reduced; nats. All float32[...]."""
    gain = chosen - rejected if margin is None else chosen - rejected - margin
    return -jax.nn.log_sigmoid(gain)


def reward(config: Reward, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over pairs.

    Args:
      scores: ``policy`` with ``reward`` float32[B, T], read at the last token of each sequence.
      batch: see `sequences`; if there, ``margin`` float32[B, S], in the place of the chosen.

    Returns the terms ``bradley_terry`` and (with a coefficient) ``center``, and the metrics ``accuracy``, ``margin``
    (mean difference), ``min_reward``, ``mean_reward``, ``max_reward`` (least and greatest: means over batches) and
    ``brier``, the squared distance of σ(r_w - r_l) to 1."""
    del carry
    each, keep = rewards(scores, batch), sequences.pair_mask(batch)
    margin = sequences.pairs(batch["margin"]).chosen if "margin" in batch else None
    losses = {"bradley_terry": terms.masked(loss(each.chosen, each.rejected, margin), keep)}
    if config.center_rewards_coefficient:
        center = terms.masked(jnp.square(each.chosen + each.rejected), keep)
        losses["center"] = Mean(config.center_rewards_coefficient * center.total, center.weight)
    both, exists = jnp.stack(each), jnp.stack([keep, keep])
    any_pair = jnp.any(keep).astype(jnp.float32)
    least = jnp.min(jnp.where(exists, both, jnp.full_like(both, jnp.inf)))
    most = jnp.max(jnp.where(exists, both, jnp.full_like(both, -jnp.inf)))
    metrics = {
        "accuracy": terms.masked((each.chosen > each.rejected).astype(jnp.float32), keep),
        "margin": terms.masked(each.chosen - each.rejected, keep),
        "min_reward": Mean(jnp.where(any_pair > 0, least, jnp.zeros_like(least)), any_pair),
        "mean_reward": terms.masked(both, exists),
        "max_reward": Mean(jnp.where(any_pair > 0, most, jnp.zeros_like(most)), any_pair),
        "brier": calibration.brier(jax.nn.sigmoid(each.chosen - each.rejected), jnp.ones_like(keep), keep),
    }
    return losses, sequences.detached(metrics)


def rewards(scores: Scores, batch: Batch) -> Pair:
    """The rewards of chosen and rejected, float32[B, S/2] each; 0 where there is no pair."""
    at_end = sequences.at_end(scores["policy"]["reward"], batch)
    return sequences.pairs(at_end)


def examine(config: Reward, scores: Scores, batch: Batch, carry: Carry) -> Means:
    """How reliable the model is where it is how sure: of the two completions, the one that it thinks better."""
    del config, carry
    each = rewards(scores, batch)
    right = each.chosen > each.rejected
    sure = jax.nn.sigmoid(jnp.abs(each.chosen - each.rejected))
    return calibration.reliability(sure, right, sequences.pair_mask(batch), low=0.5)
