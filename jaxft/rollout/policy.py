"""What a source of rollouts asks of the policy: completions as it writes them now, and the trainer's scores of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.core import tree
from jaxft.data.prompts import Prompt
from jaxft.models import attention_paged
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.objectives import terms
from jaxft.objectives.terms import Batch, Carry, Means
from jaxft.rollout import generate
from jaxft.rollout.config import RolloutConfig
from jaxft.rollout.generate import Completion, GenerateConfig
from jaxft.rollout.score import Score

SCORED = ("tokens", "positions", "segments", "task_ids")
Sampler = Callable[[Any, Sequence[Prompt], int], list[Completion]]
"""``(state, prompts, seed) -> completions``, those of one prompt after each other."""
Annotator = Callable[
    [Any, Mapping[str, np.ndarray], Mapping[str, float]],
    tuple[dict[str, np.ndarray], dict[str, float], dict[str, float]],
]
"""``(state, rollout, running) -> (arrays to add, metrics, the next running quantities)``."""


def sampler(
    config: RolloutConfig,
    model: ModelConfig,
    base: tree.Params,
    *,
    dtype: Any,
    end: Sequence[int],
    execution: Execution,
    tokenizer: Any = None,
) -> Sampler:
    """Completions of the policy whose trained arrays are the state's, on frozen ``base``; ``tokenizer`` finds
    ``config.stop``."""
    same = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "batch")
    settings = GenerateConfig(**{name: getattr(config, name) for name in same})
    merge = config.merge == "always" or (config.merge == "auto" and attention_paged.on_one_gpu())

    def sample(state: Any, prompts: Sequence[Prompt], seed: int) -> list[Completion]:
        params = tree.cast(terms.actor(tree.combine(state.trainable, base)), dtype)
        tasks = [prompt.task for prompt in prompts]
        return generate.generate(
            model, params, [prompt.tokens for prompt in prompts], dataclasses.replace(settings, seed=seed), end,
            execution=execution, tasks=tasks if any(tasks) else None, samples=config.samples, tokenizer=tokenizer,
            merge=merge,
        )  # fmt: skip

    return sample


def annotator(
    score: Score,
    needs: Sequence[str],
    estimate: Callable[[Batch, Carry], tuple[Mapping[str, jax.Array], Means, Carry]],
    base: tree.Params,
    *,
    others: Mapping[str, tree.Params],
    place: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]],
    rows: int,
) -> Annotator:
    """Scores a rollout (`Objective.rollout_needs`) as the trainer does, and estimates what rewards say of its tokens.

    Args:
      score: that of the step.
      estimate: `Objective.estimate` with its settings.
      others: models besides the one that trains, by view; a ``reference`` takes the place of the policy's start.
      place: puts arrays [micro-batches, rows, T] on the device or mesh.
      rows: those of a micro-batch; must divide the rollout's.
    """

    @jax.jit
    def scored(
        trainable: tree.Params, start: Any, base: tree.Params, others: Any, batch: Batch
    ) -> dict[str, jax.Array]:
        params = tree.combine(trainable, base)

        def one(micro: Batch) -> dict[str, jax.Array]:
            found = {}
            if "old_logp" in needs:
                found["old_logp"] = score("policy", terms.actor(params), micro)["logp"]
            if "ref_logp" in needs:
                own = others.get("reference")
                own = tree.combine(terms.actor(start), terms.actor(base)) if own is None else own
                found["ref_logp"] = score("reference", own, micro)["logp"]
            if "value" in needs:
                found["value"] = score("value", params[terms.CRITIC], micro)["value"]
            return found

        return jax.lax.map(one, batch)

    @jax.jit
    def estimated(rollout: Batch, running: Carry) -> Any:
        return estimate(rollout, running)

    def annotate(
        state: Any, rollout: Mapping[str, np.ndarray], running: Mapping[str, float]
    ) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, float]]:
        known = {}
        if needs:
            count = rollout["tokens"].shape[0] // rows
            micro = {n: rollout[n].reshape(count, rows, *rollout[n].shape[1:]) for n in SCORED if n in rollout}
            found = jax.device_get(scored(state.trainable, state.start, base, dict(others), place(micro)))
            known = {name: value.reshape(-1, *value.shape[2:]) for name, value in found.items()}
        before = {name: np.float32(value) for name, value in running.items()}
        added, means, after = jax.device_get(estimated({**rollout, **known}, before))
        # what has no weight is not known
        metrics = {name: float(mean.total / mean.weight) for name, mean in means.items() if mean.weight > 0}
        return {**known, **added}, metrics, {name: float(value) for name, value in after.items()}

    return annotate
