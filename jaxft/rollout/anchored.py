"""Scores of a policy beside itself as the run began: how far its next-token distribution has moved.

The step scores the view ``start`` first, the trained arrays as they were on the same frozen base, so no second model
exists; what it returns, hidden states and the head that reads them, meets the policy's in the chunked head.
"""

from typing import Any

import jax

from jaxft.core import tree
from jaxft.models import decoder, divergences, heads
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.models.divergences import Divergence
from jaxft.objectives.terms import Batch
from jaxft.rollout import score as score_
from jaxft.rollout.score import Score


def make_score(
    config: ModelConfig,
    divergence: Divergence,
    needs: tuple[str, ...] = ("logp", "divergence"),
    *,
    reports: tuple[str, ...] = (),
    dtype: Any,
    execution: Execution = decoder.DEFAULT,
    neftune_alpha: float = 0.0,
) -> Score:
    """Builds ``score(view, params, batch, key=None)`` for the views ``policy`` and ``start``.

    The policy returns ``needs`` (with a gradient) and ``reports`` of `divergences.token_scores`, float32[B, T]; the
    start, which has no dropout and no noise, is the distribution that it is compared with."""

    def score(view: str, params: tree.Params, batch: Batch, key: jax.Array | None = None) -> dict[str, Any]:
        if view not in ("policy", "start"):
            raise ValueError(f"view: got {view!r}; expected policy or start")
        noise_BTD = score_.noise(config, neftune_alpha, batch, key, score_.reserved_in(params, batch))
        params = tree.cast(tree.dropout_keys(params, score_.dropout_key(key)), dtype)
        hidden_BTD, _ = score_.states(config, params, batch, noise_BTD, execution=execution)
        head = heads.head_of(config, params)
        if view == "start":
            return {"hidden": hidden_BTD, "head": head}
        begun: Any = jax.lax.stop_gradient(batch["teacher"])
        given = (config, head, hidden_BTD, score_.predicted(batch["tokens"]))
        held = (config, begun["head"], begun["hidden"])
        out = divergences.token_scores(divergence, *given, held, needs, reports=reports, mesh=execution.mesh)
        return score_.aligned(out, params, batch)

    return score
