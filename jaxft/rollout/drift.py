"""How far a policy has moved from its reference on what it writes itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.models.divergences import Divergence
from jaxft.objectives.terms import Batch
from jaxft.rollout import anchored, distil

KL = Divergence("reverse_kl")
"""Of the policy from what it is compared with."""


def make_drift(
    config: ModelConfig, other: ModelConfig | None, *, dtype: Any, execution: Execution, reserved: int = 0
) -> Callable[[tree.Params, tree.Params, Batch], jax.Array]:
    """Builds ``drift(policy, reference, batch) -> float32[B]``: of each row, the divergence KL(policy | reference) of
    the whole next-token distributions, summed over the tokens that ``loss_mask`` marks, in nats.

    ``other``: the reference's config where it is another model, without the policy's learnt prompt of ``reserved``
    positions; None: the same model with other arrays."""
    if other is None:
        view, score = "start", anchored.make_score(config, KL, ("divergence",), dtype=dtype, execution=execution)
    else:
        shared = min(config.vocab_size, other.vocab_size)
        view, score = "teacher", distil.make_score(
            config, other, ("divergence",), dtype=dtype, divergence=KL, vocabulary=shared, reserved=reserved,
            execution=execution,
        )  # fmt: skip

    def drift(policy: tree.Params, reference: tree.Params, batch: Batch) -> jax.Array:
        known: Any = {**batch, "teacher": score(view, reference, batch)}
        apart = score("policy", policy, known)["divergence"]
        return jnp.sum(jnp.where(batch["loss_mask"], apart, 0.0), axis=1)

    return drift
