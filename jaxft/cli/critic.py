"""The value model of a run: further adapters and a scalar head on the policy's very base, or a model of its own.

It is the tree ``critic`` in the policy's parameters, a whole one: `jaxft train` optimises, shards and saves it with the
policy, and what is written of the policy leaves it out.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxft import model as model_
from jaxft import peft, run_dir, scoring
from jaxft.border.errors import ConfigError
from jaxft.cli import assemble, heads, scorers
from jaxft.config import RunConfig, ValueSection
from jaxft.core import hooks as hooks_
from jaxft.core import tree
from jaxft.model import Model
from jaxft.models import slots
from jaxft.models.decoder import Execution
from jaxft.objectives import OBJECTIVES, terms
from jaxft.objectives.terms import Batch
from jaxft.peft import native, store
from jaxft.rollout import distil
from jaxft.rollout import score as score_
from jaxft.rollout.score import REWARD, Score

VIEW = "value"


def wanted(config: RunConfig) -> bool:
    """Whether the objective trains a value model."""
    return VIEW in OBJECTIVES[config.objective.name].asked(config.objective.value).views


def check(config: RunConfig) -> None:
    """Raises ConfigError where the section `value` does not fit the rest, before anything is read."""
    section, usual = config.value, ValueSection()
    given = [f"value.{f}" for f, v in vars(section).items() if v != getattr(usual, f)]
    if not wanted(config):
        if given:
            raise ConfigError(f"`{given[0]}`: objective {config.objective.name} has no value model; leave it out")
        return
    if section.path is None and (foreign := {"value.revision", "value.quantize"} & {*given}):
        raise ConfigError(f"`{min(foreign)}`: says something of a model of its own; give value.path, or leave it out")
    if config.optim.l2_start or config.optim.ewc:
        key = "l2_start" if config.optim.l2_start else "ewc"
        raise ConfigError(f"`optim.{key}`: beside a value model, which is to move, it is not there yet; leave it out")
    for method in [choice.value for choice in section.peft]:
        if peft.method_of(method).calibrate(method) is not None:
            raise ConfigError("`value.peft.init`: it begins from training data, and a run on rollouts has none")


@dataclass(frozen=True)
class Critic:
    """A value model before the first step."""

    model: Model
    """Without parameters."""
    made: assemble.Adapted
    methods: tuple[Any, ...]
    shared: bool
    """Whether its frozen arrays are the policy's base."""
    changed: set[str]
    """See `assemble.Split`."""

    @property
    def adds(self) -> int:
        """Parameters that it has besides the policy's base."""
        return tree.count(tree.partition(*self.made[:2])[0]) if self.shared else tree.count(self.made[0])


def make(config: RunConfig, base: Model, mesh: Mesh | None, steps: int) -> Critic | None:
    """The value model of the run; None where it has none. ``base``: the policy's, with its parameters. Raises
    ConfigError and ValueError for one that does not fit the policy."""
    if not wanted(config):
        return None
    model, methods, shared = _begun(config, base, mesh)
    key = jax.random.fold_in(jax.random.key(config.train.seed), 4)
    if not model.config.labels:
        head = scoring.reward_model if config.value.save else scoring.headed  # which others can load
        model = heads.placed(head(model, key, init=config.value.head), mesh)
    elif model.config.labels > 1:
        scoring.check(model)
    params, mask, rates = peft.adapt_for_training(model, jax.random.fold_in(key, 1), methods)
    if peft.hooks(methods, params, steps) is not hooks_.NONE:
        raise ConfigError("`value.peft`: its method changes itself in every step; choose another, such as lora")
    store.check("value.peft", params, model.names, model.config.num_layers)
    _check_rows(config, model, params)
    changed = native.changed(params, model.params)
    return Critic(dataclasses.replace(model, params=None), (params, mask, rates), methods, shared, changed)


def _begun(config: RunConfig, base: Model, mesh: Mesh | None) -> tuple[Model, tuple[Any, ...], bool]:
    """What the value model begins from, the methods that train it, and whether its arrays are the policy's base."""
    section, given = config.value, tuple(choice.value for choice in config.value.peft)
    if section.path is None:
        return base, given or tuple(choice.value for choice in config.peft), True
    how = {"revision": section.revision, "quantize": section.quantize}
    found = scorers.find("value.path", section.path, config, base, mesh, **how)
    if not found.shared:
        scorers.same_tokens(found.model, base, VIEW)
    if found.adapter is None:
        return found.model, given or (peft.Full(),), False
    if given:
        raise ConfigError(
            f"`value.peft`: {section.path} is an adapter, which is trained on; leave value.peft out, or value.path and "
            "give value.peft: [{method: adapter, path: ...}, ...]"
        )
    return found.model, (peft.Adapter(path=str(found.adapter), frozen=False),), found.shared


def _check_rows(config: RunConfig, model: Model, params: tree.Params) -> None:
    """Raises ConfigError for a value model that cannot read the rows of the policy."""
    own, reserved = slots.prompt_length(params), assemble.virtual(config).get("prompt", 0)
    if own not in (0, reserved):
        got = f"a learnt prompt of {own} positions where the policy's rows keep {reserved}"
        raise ConfigError(f"`value.peft`: got {got}; expected as many, or another method")
    if model.config.learned_positions and model.config.max_positions < config.data.max_length:
        room = f"{model.config.max_positions} positions for rows of {config.data.max_length} tokens (data.max_length)"
        raise ConfigError(f"`value.path`: got a model with {room}; expected at least as many")


def scorer(config: RunConfig, critic: Critic, score: Score, dtype: Any, how: Execution) -> Score:
    """The policy's ``score`` with the view ``value``: {"value": float32[B, T]}."""
    judge = score_.make_score(critic.model.config, (REWARD,), dtype=dtype, execution=how)
    reserved = assemble.virtual(config).get("prompt", 0)

    def either(view: str, params: tree.Params, batch: Batch, key: Any = None) -> dict[str, jax.Array]:
        if view != VIEW:
            return score(view, params, batch, key)
        if not slots.prompt_length(params):
            batch = distil.unreserved(batch, reserved) | {n: batch[n] for n in ("task_ids",) if n in batch}
        key = None if key is None else jax.random.fold_in(key, 1)  # its dropout is not the policy's
        return {"value": judge(view, params, batch, key)[REWARD]}

    return either


def write(critic: Critic, params: tree.Params, dtype: str, folder: Path) -> Path:
    """The value model that was trained, as an adapter or a whole model; an earlier one is replaced."""
    out, own, model = folder / run_dir.VALUE, params[terms.CRITIC], critic.model
    if not tree.adapters(own):
        return model_.save_hf(model, own, out, dtype=dtype, overwrite=out.exists())
    store.save(
        own,
        model.names,
        model.config.num_layers,
        out,
        methods=critic.methods,
        changed=critic.changed,
        new_tokens=model.new_tokens,
        base_model_name_or_path=model.source,
        overwrite=out.exists(),
    )
    model.tokenizer.save_pretrained(out)
    return out
