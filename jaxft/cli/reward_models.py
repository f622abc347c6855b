"""The reward models among a run's rewards: loaded before the policy is adapted, so that those that are adapters on its
base share it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jaxft import rewards, scoring
from jaxft.checkpoint import tokenizer
from jaxft.cli import scorers
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.model import Model
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.rewards.model import RewardModel
from jaxft.rewards.settings import Function, Reward
from jaxft.rollout import reward_model
from jaxft.rollout.reward_model import Reader

NAME = "model"
"""Of such a reward in the table."""


@dataclass(frozen=True)
class Loaded:
    """A reward model but for its parameters."""

    config: ModelConfig
    reader: Reader
    shared: bool
    """Whether its arrays are those of the policy's base."""


@dataclass(frozen=True)
class RewardModels:
    """All of a run's, by what each is read from."""

    models: Mapping[str, Loaded]
    params: Mapping[str, tree.Params]

    def table(self, params: Mapping[str, tree.Params], dtype: Any, how: Execution) -> dict[str, Reward]:
        """The rewards that there are, with these models. ``params``: theirs, as the run holds them."""

        def make(config: RewardModel) -> Function:
            found, key = self.models[_key(config)], _key(config)
            score = reward_model.scorer(
                found.config, params[key], found.reader, dtype=dtype, execution=how, batch=config.batch
            )

            def model(
                prompts: Sequence[Any], completions: Sequence[str], finished: Sequence[bool], **columns: Any
            ) -> list[Any]:
                return score(prompts, completions, finished)

            return model

        return {**rewards.REWARDS, NAME: Reward(RewardModel, make)}


def load(config: RunConfig, base: Model, mesh: Mesh | None) -> RewardModels:
    """``base``: the policy's, with its parameters. Raises ConfigError and ValueError for what is no reward model."""
    models, params = dict[str, Loaded](), dict[str, tree.Params]()
    for choice in config.rewards:
        if not isinstance(choice.value, RewardModel) or (key := _key(choice.value)) in models:
            continue
        section: RewardModel = choice.value
        how = {"revision": section.revision, "quantize": section.quantize}
        found = scorers.find(f"rewards.{choice.name}.path", section.path, config, base, mesh, **how)
        scoring.check(found.model)
        params[key] = found.params(mesh)
        models[key] = Loaded(found.model.config, _reader(found, base), found.shared)
    return RewardModels(models, params)


def _reader(found: scorers.Scorer, base: Model) -> Reader:
    """Its own tokenizer and chat template; the policy's template where it has none."""
    own = None if found.adapter is None else tokenizer.load(found.adapter)
    own = found.model.tokenizer if own is None else own
    if not own.chat_template:
        own = copy.deepcopy(own)
        own.chat_template = base.tokenizer.chat_template
    return Reader(own, found.config.data.template_options)


def _key(config: RewardModel) -> str:
    return f"{config.path} {config.revision} {config.quantize}"
