r"""Process rewards: whether each step of a solution is right, said where the step ends.

.. math:: L = -\frac{1}{N} \sum_t \left[ y_t \log \sigma(s_t) + (1 - y_t) \log(1 - \sigma(s_t)) \right]

over the ends t of all steps, where the scalar head says s: Lightman et al. 2023, section 2.6 (arXiv:2305.20050). With
``train_on_last_step_only`` over the last step of each solution alone, which makes it an outcome reward: Uesato et al.
2022 (arXiv:2211.14275).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.objectives import calibration, sequences, terms
from jaxft.objectives.terms import Batch, Carry, Mean, Means, Scores


@dataclass(frozen=True)
class PRM:
    """A process reward model: is each step of a solution right?"""

    train_on_last_step_only: bool = False
    """Whether only the last step of a solution that is in the window is learnt; the metrics are of all."""
    head: Literal["normal", "zeros"] = "normal"
    """How the head begins that a language model is given: drawn as transformers draws it, or zeros."""


def loss(score: jax.Array, label: jax.Array) -> jax.Array:
    """Cross-entropy of each step, not reduced; nats. score: float32[...]; label: bool of the same shape."""
    return -jax.nn.log_sigmoid(jnp.where(label, score, -score))


def prm(config: PRM, scores: Scores, batch: Batch, carry: Carry) -> tuple[Means, Means]:
    """Sums over the ends of steps.

    Args:
      scores: ``policy`` with ``reward`` float32[B, T].
      batch: ``step_mask`` bool[B, T], True where a step ends, ``step_label`` bool[B, T], True where it is right, and
        ``segments`` int32[B, T].

    Returns the term ``prm`` and the metrics ``accuracy`` (σ(s) > 1/2 where the step is right, and not elsewhere),
    ``accuracy/right`` and ``accuracy/wrong`` (of right and of wrong steps) and ``brier``, over all steps."""
    del carry
    ends, label = batch["step_mask"], batch["step_label"]
    said = jnp.where(ends, scores["policy"]["reward"], jnp.zeros((), jnp.float32))
    learnt = ends & last_steps(batch) if config.train_on_last_step_only else ends
    correct = ((said > 0) == label).astype(jnp.float32)
    metrics: dict[str, Mean] = {
        "accuracy": terms.masked(correct, ends),
        "accuracy/right": terms.masked(correct, ends & label),
        "accuracy/wrong": terms.masked(correct, ends & ~label),
        "brier": calibration.brier(jax.nn.sigmoid(said), label, ends),
    }
    return {"prm": terms.masked(loss(said, label), learnt)}, sequences.detached(metrics)


def last_steps(batch: Batch) -> jax.Array:
    """bool[B, T]: no step of the same solution ends later."""
    ends, segments = batch["step_mask"], batch["segments"]
    at = jnp.broadcast_to(jnp.arange(ends.shape[1], dtype=jnp.int32), ends.shape)
    count = ends.shape[1] + 1  # more than a row can hold
    latest = jax.vmap(lambda x, s: jax.ops.segment_max(x, s, num_segments=count))(jnp.where(ends, at, -1), segments)
    return at >= jnp.take_along_axis(latest, segments, axis=1)


def examine(config: PRM, scores: Scores, batch: Batch, carry: Carry) -> Means:
    """How often steps are right that the model thinks right with a probability."""
    del config, carry
    probability = jax.nn.sigmoid(scores["policy"]["reward"])
    return calibration.reliability(probability, batch["step_label"], batch["step_mask"])
