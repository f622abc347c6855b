"""The head that an objective asks for: one that scores for a reward model, the one over the vocabulary for all else."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft import scoring
from jaxft.border.errors import ConfigError
from jaxft.config import RunConfig
from jaxft.data import Prepared
from jaxft.model import Model
from jaxft.objectives import OBJECTIVES
from jaxft.rollout.score import REWARD
from jaxft.sharding import rules


def scores(config: RunConfig) -> bool:
    """Whether the objective trains a reward model."""
    return REWARD in OBJECTIVES[config.objective.name].asked(config.objective.value).needs


def fitted(config: RunConfig, model: Model, mesh: Mesh | None = None) -> Model:
    """The model with a scalar head where the objective asks for one; a reward model has it already.

    Raises ConfigError for a reward model where another head is asked for, ValueError for what cannot score."""
    if scores(config):
        key, settings = jax.random.fold_in(jax.random.key(config.train.seed), 3), config.objective.value
        return placed(scoring.reward_model(model, key, init=settings.head), mesh)
    refuse_scorer(config, model)
    return model


def refuse_scorer(config: RunConfig, model: Model) -> None:
    """Raises ConfigError for a model that scores sequences where the objective wants one that speaks."""
    if model.config.labels and not scores(config):
        raise ConfigError(
            f"`objective.name`: {config.objective.name} trains a language model, and {model.source} scores sequences; "
            "set objective.name=reward (or prm), or model.path to the language model that it was made from"
        )


def placed(model: Model, mesh: Mesh | None) -> Model:
    """The model with its head on the mesh too."""
    if mesh is None:
        return model
    return dataclasses.replace(model, params=jax.device_put(model.params, rules.shardings(model.params, mesh)))


def check_ends(config: RunConfig, prepared: Prepared) -> None:
    """Raises ConfigError for sequences that end in the padding token: `transformers` would score them before it."""
    for examples in (prepared.train, prepared.held_out):
        if examples is None or not scores(config) or examples.form != "pairs" or not len(examples):
            continue
        count = int(np.sum(examples.tokens[examples.offsets[1:] - 1] == examples.pad_id))
        if count:
            raise ConfigError(
                f"`model.pad_token`: {count:,} of {len(examples):,} sequences end in the padding token (id "
                f"{examples.pad_id}), and transformers reads a reward at the last token that is not padding; expected "
                "a token that no text holds: name one of the vocabulary, or a new one (also in model.new_tokens)"
            )
