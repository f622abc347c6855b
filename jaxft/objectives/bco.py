r"""BCO: a binary classifier of desirable and undesirable completions, its zero at the running mean of the rewards.

.. math:: L = -\frac{1}{N} \sum_y \log \sigma(\pm (\beta r_y - \delta)), \qquad
          r_y = \log \frac{\pi(y|x)}{\pi_\text{ref}(y|x)}

with + for the desirable. Jung et al. 2024, sec. 4 (arXiv:2404.04656). δ is the mean of βr over all completions of all
steps so far, those of this step included; it has no gradient.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.objectives import labelled, sequences, terms
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores


@dataclass(frozen=True)
class BCO:
    """Binary classifier optimisation, on completions labelled desirable or not."""

    beta: float = 0.1
    """How closely the policy keeps to the reference; lower goes further."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"objective.beta: got {self.beta}; expected a number above 0")


def begin(config: BCO) -> Carry:
    """No rewards yet: their ``mean``, and of how many (``count``)."""
    del config
    return {"mean": jnp.float32(0), "count": jnp.float32(0)}


def annotate(config: BCO, scores: Scores, batch: Batch, carry: Carry) -> tuple[dict[str, jax.Array], Carry]:
    """Takes the whole batch's rewards into the running mean, and finds `labelled.margin_shares`."""
    now = terms.masked(config.beta * labelled.log_ratios(scores, batch), batch["sequence_mask"])
    count = carry["count"] + now.weight
    mean = carry["mean"] + terms.divide(now.total - carry["mean"] * now.weight, count)
    return {"margin_share": labelled.margin_shares(batch)}, {"mean": mean, "count": count}


def bco(config: BCO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sum over completions; nats.

    Args:
      scores: ``policy`` and ``reference`` with ``logp`` float32[B, T]; if there, ``correct`` and ``entropy``.
      batch: see `sequences`; ``label`` bool[B, S], True where desirable; and what `annotate` finds.
      carry: ``mean``, δ, with this batch in it.

    Returns the term ``bco`` and the metrics ``delta`` and those of `labelled.metrics` with rewards βr."""
    rewards, keep = config.beta * labelled.log_ratios(scores, batch), batch["sequence_mask"]
    gain = rewards - carry["mean"]
    loss = -jax.nn.log_sigmoid(jnp.where(batch["label"], gain, -gain))
    metrics = labelled.metrics(rewards, sequences.sums(scores["policy"]["logp"], batch), scores, batch)
    number = jnp.sum(keep, dtype=jnp.float32)
    metrics["delta"] = Mean(jax.lax.stop_gradient(carry["mean"]) * number, number)
    return {"bco": terms.masked(loss, keep)}, metrics
