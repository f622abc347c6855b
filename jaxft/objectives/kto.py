r"""KTO: single completions labelled desirable or not, against what the policy usually gains on the reference.

.. math:: L = \frac{1}{N} \sum_y \lambda_y \left( 1 - \sigma(\pm \beta (r_y - z_0)) \right), \qquad
          r_y = \log \frac{\pi(y|x)}{\pi_\text{ref}(y|x)}, \quad
          z_0 = \max\left( 0, \frac{1}{N} \sum_{y'} \log \frac{\pi(y'|x)}{\pi_\text{ref}(y'|x)} \right)

with + for the desirable. Ethayarajh et al. 2024, eq. 7 (arXiv:2402.01306). The y' are the completions of other
prompts of the batch; z_0, an estimate of the KL divergence, is of the whole batch of a step and has no gradient.
``apo_zero_unpaired`` does without it: D'Oosterlinck et al. 2024, eq. 7 (arXiv:2408.06266).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import labelled, sequences, terms
from jaxft.objectives.terms import Batch, Carry, Means, Scores


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimisation, on completions labelled desirable or not."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto compares with the policy's usual gain on the reference, apo_zero_unpaired with 0."""
    beta: float = 0.1
    """How closely the policy keeps to the reference; lower goes further."""
    desirable_weight: float = 1.0
    """Weight of desirable completions, to make up for unequal numbers."""
    undesirable_weight: float = 1.0
    """Weight of the others."""

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name}: got {getattr(self, name)}; expected a number above 0")


def asides(config: KTO) -> tuple[str, ...]:
    """Completions beside the batch's own that it asks for: those of other prompts."""
    return ("kl",) if config.loss == "kto" else ()


def annotate(config: KTO, scores: Scores, batch: Batch, carry: Carry) -> tuple[dict[str, jax.Array], Carry]:
    """Finds ``kl`` float32[rows], z_0 in nats, in the mismatched completions ``kl_...`` of the whole batch, and
    `labelled.margin_shares`."""
    kl = jnp.float32(0)
    if config.loss == "kto":
        beside = {name: batch[f"kl_{name}"] for name in ("loss_mask", "segments", "sequence_mask")}
        ratios = labelled.log_ratios({view: scores[f"{view}/kl"] for view in ("policy", "reference")}, beside)
        kl = jnp.maximum(terms.divide(*terms.masked(ratios, beside["sequence_mask"])), 0.0)
    rows = batch["sequence_mask"].shape[:1]
    return {"kl": jnp.broadcast_to(kl, rows), "margin_share": labelled.margin_shares(batch)}, carry


def kto(config: KTO, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sum over completions.

    Args:
      scores: ``policy`` and ``reference`` with ``logp`` float32[B, T]; if there, ``correct`` and ``entropy``.
      batch: see `sequences`; ``label`` bool[B, S], True where desirable; and what `annotate` finds.

    Returns the term ``kto`` and the metrics ``kl`` (z_0) and those of `labelled.metrics` with rewards βr."""
    del carry
    ratios, keep, label = labelled.log_ratios(scores, batch), batch["sequence_mask"], batch["label"]
    gain = config.beta * (ratios - batch["kl"][:, None])
    loss = jax.nn.sigmoid(jnp.where(label, -gain, gain))
    loss = loss * jnp.where(label, config.desirable_weight, config.undesirable_weight)
    metrics = labelled.metrics(config.beta * ratios, sequences.sums(scores["policy"]["logp"], batch), scores, batch)
    metrics["kl"] = terms.masked(batch["kl"], jnp.ones(batch["kl"].shape, bool))
    return {"kto": terms.masked(loss, keep)}, metrics
