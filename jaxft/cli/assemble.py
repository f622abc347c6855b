"""From a config to the pieces of a run: model, data, parameters split into trained and frozen, score, step, evaluators.

This is where the rooms meet; each function here is one seam and decides nothing else.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from jaxft import data, peft, vocabulary
from jaxft import model as model_
from jaxft.cli import heads
from jaxft.config import RunConfig
from jaxft.core import hooks as hooks_
from jaxft.core import tree
from jaxft.core.hooks import Hooks
from jaxft.data import Examples, Loader, Prepared
from jaxft.model import Model
from jaxft.models import flops, slots
from jaxft.models.decoder import Execution
from jaxft.models.divergences import Divergence
from jaxft.objectives import OBJECTIVES, terms
from jaxft.objectives.terms import Objective
from jaxft.peft import native, store
from jaxft.rollout import anchored, members, score
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.training import by_source, optim, paged, prefetch, state
from jaxft.training.optim import Optimizer
from jaxft.training.state import TrainState

Adapted = tuple[tree.Params, tree.Params, tree.Params]
"""Parameters, what of them trains, and the default learning rate of that."""
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@dataclass(frozen=True)
class Split:
    """An adapted model, split by what trains."""

    trainable: tree.Params
    frozen: tree.Params
    rates: tree.Params
    """Default learning rate of each trainable array: that of the method it belongs to."""
    shardings: tree.Params | None
    """Of the trainable arrays, on a mesh."""
    changed: set[str]
    """Paths of the model's own arrays that a method has put others in the place of."""


def devices(config: RunConfig) -> Mesh | None:
    """Joins other hosts if asked to; the mesh, or None on a single device."""
    if config.train.deterministic and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    mesh_.start(config.mesh)
    mesh_.sizes(config.mesh, len(jax.devices()))
    if len(jax.devices()) == 1:
        return None
    mesh = mesh_.create(config.mesh)
    mesh_.check_rows(mesh, config.train.batch)
    return mesh


def model(config: RunConfig, mesh: Mesh | None) -> Model:
    """The base model, read or drawn anew, with the chat template that the data is written in."""
    section = config.model
    if section.init == "pretrained":
        found = model_.load(section.path, section.dtype, revision=section.revision, mesh=mesh, quantize=config.quant)
    else:
        key = jax.random.key(config.train.seed)
        how = {"revision": section.revision, "mesh": mesh, "quantize": config.quant}
        found = model_.random(section.path, section.dtype, key=key, **how)
    if found.tokenizer is None:
        raise ValueError(f"model.path: {section.path} holds no tokenizer; put the model's tokenizer files beside it")
    if section.new_tokens:
        found = vocabulary.grow(found, section.new_tokens, section.vocab_multiple)
        if mesh is not None:
            found = dataclasses.replace(found, params=jax.device_put(found.params, rules.shardings(found.params, mesh)))
    found = heads.fitted(config, vocabulary.padded_with(found, section.pad_token), mesh)
    data.install(found.tokenizer, config.data.template)
    return dataclasses.replace(found, own_tokenizer=found.tokenizer)


def statistics(config: RunConfig, base: Model, prepared: Prepared, how: Execution) -> dict[str, Any]:
    """What methods that begin from data ask of the first training batches, by path; empty if there are none."""
    dtype = base.params["embed"]["tokens"].dtype
    scored = score.make_score(base.config, dtype=dtype, execution=dataclasses.replace(how, unroll=False))
    place, found = mesh_.placer(how.mesh), dict[str, Any]()
    for method in [choice.value for choice in config.peft]:
        if peft.method_of(method).calibrate(method) is not None:
            loader = Loader(prepared.train, config.data, batch_rows=config.train.batch)
            numbers = range(min(method.calibration_batches, loader.batches_per_epoch))
            batches = (place(prefetch.split(loader.batch(i), 1)) for i in numbers)
            rows = ({name: value[0] for name, value in batch.items()} for batch in batches)
            found |= peft.calibrate(base, rows, method, lambda params, batch: scored("policy", params, batch)["logp"])
    return found


def adapted(config: RunConfig, base: Model, statistics: dict[str, Any] | None = None) -> Adapted:
    """The methods applied to the base: parameters, what of them trains, and the default learning rate of that.

    Raises AdapterError for what could not be saved once it is trained."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
    made = peft.adapt_for_training(base, key, [choice.value for choice in config.peft], statistics)
    store.check("peft", tree.dropout_keys(made[0], None), base.names, base.config.num_layers)
    return made


def split(
    config: RunConfig,
    base: Model,
    mesh: Mesh | None,
    statistics: dict[str, Any] | None = None,
    besides: Mapping[str, Adapted] = MappingProxyType({}),
) -> Split:
    """The methods applied to the base, and the parameters split into trained and frozen. ``besides``: what trains with
    the model and is no part of it."""
    own = adapted(config, base, statistics)
    changed = native.changed(own[0], base.params)
    params, mask, rates = ({**part, **{n: b[i] for n, b in besides.items()}} for i, part in enumerate(own))
    trainable, frozen = tree.partition(params, mask)
    if mesh is None:
        return Split(trainable, frozen, rates, None, changed)
    places = rules.shardings(params, mesh)
    ours, theirs = tree.partition(places, mask)
    return Split(jax.device_put(trainable, ours), jax.device_put(frozen, theirs), rates, ours, changed)


def execution(config: RunConfig, mesh: Mesh | None) -> Execution:
    """How the model is computed on this machine."""
    unroll = {"always": True, "never": False, "auto": mesh is None and jax.default_backend() == "gpu"}
    attention = config.model.attention
    if config.train.deterministic and jax.default_backend() == "gpu":
        if attention == "cudnn":
            raise ValueError("model.attention=cudnn is not deterministic: use xla (or auto) with train.deterministic")
        attention = "xla"
    if config.train.remat == "offload":
        paged.check(jax.local_devices()[0], "train.remat=offload")
    gather = None if mesh is None else rules.gather(mesh)
    return Execution(config.train.remat, unroll[config.train.unroll], attention, mesh, gather)


def objective(config: RunConfig, examples: Examples) -> Objective:
    """What is minimised; of a mixture, with metrics of each source."""
    names = () if examples.mixture is None else examples.mixture.names
    return by_source.by_source(OBJECTIVES[config.objective.name], names)


def scorer(config: RunConfig, base: Model, how: Execution, differs: tree.Params | None = None) -> score.Score:
    """What the objective asks of the model, and what it can report besides; ``differs``: of a sweep's members."""
    asked = OBJECTIVES[config.objective.name].asked(config.objective.value)
    dtype = base.params["embed"]["tokens"].dtype
    needs, alpha = (*asked.needs, *asked.reports), config.train.neftune_alpha
    if differs is not None:
        return members.make_score(base.config, needs, differs, dtype=dtype, execution=how, neftune_alpha=alpha)
    if "start" in asked.views:
        apart = Divergence(config.objective.value.kl_divergence)
        named: dict[str, Any] = {"needs": asked.needs, "reports": asked.reports}
        return anchored.make_score(base.config, apart, **named, dtype=dtype, execution=how, neftune_alpha=alpha)
    named = {"neftune_alpha": alpha, "temperature": temperature(config)}
    return score.make_score(base.config, needs, dtype=dtype, execution=how, **named)


def temperature(config: RunConfig) -> float:
    """What the logits of scores are divided by: that of the draws, where the policy's own are learnt from."""
    return config.rollout.temperature if OBJECTIVES[config.objective.name].rows == "rollout" else 1.0


def hooks(config: RunConfig, parts: Split, steps: int) -> Hooks:
    """What the methods do in each step besides the forward pass."""
    params = terms.actor(tree.combine(parts.trainable, parts.frozen))
    made = peft.hooks([choice.value for choice in config.peft], params, steps)
    if made is not hooks_.NONE and config.optim.name == "schedule_free":
        raise ValueError(
            "optim.name: schedule_free averages what the method changes in each step; choose another, such as adamw"
        )
    return made if made is hooks_.NONE or terms.CRITIC not in parts.trainable else _of_actor(made)


def _of_actor(made: Hooks) -> Hooks:
    """Hooks of the policy alone, where a value model trains beside it."""

    def update(step: jax.Array, params: tree.Params, grads: tree.Params, own: Any) -> tuple[tree.Params, Any]:
        after, own = made.update(step, terms.actor(params), terms.actor(grads), own)
        return {**params, **after}, own

    return Hooks(
        lambda params: made.start(terms.actor(params)),
        lambda params, grads: {**grads, **made.gradients(terms.actor(params), terms.actor(grads))},
        update,
    )


def start(
    config: RunConfig,
    parts: Split,
    steps: int,
    mesh: Mesh | None,
    hooks: Hooks = hooks_.NONE,
    fisher: tree.Params | None = None,
) -> tuple[Optimizer, TrainState, TrainState | None]:
    """The optimiser, the state before the first step, and the state's shardings; ``fisher``: see `TrainState`."""
    default, factors = rates(config, parts)
    optimizer = optim.make(config.optim, parts.trainable, steps, default, factors)
    return optimizer, *first_state(config, parts, optimizer, state_key(config), mesh, hooks.start, fisher)


def rates(config: RunConfig, parts: Split) -> tuple[float, tree.Params]:
    """The default learning rate, and the factors by which single arrays differ from it."""
    first = peft.first_rate([choice.value for choice in config.peft])
    factors = jax.tree.map(lambda rate: rate / first, parts.rates)
    for choice in config.peft:
        groups = peft.method_of(choice.value).groups(choice.value)
        if groups:
            factors = jax.tree.map(lambda f, g: f * g, factors, optim.multipliers(groups, parts.trainable))
    return first, factors


def state_key(config: RunConfig) -> jax.Array:
    """The key of a run's dropout and noise."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 2)


def first_state(
    config: RunConfig,
    parts: Split,
    optimizer: Optimizer,
    key: jax.Array,
    mesh: Mesh | None,
    method: Callable[[tree.Params], Any],
    fisher: tree.Params | None = None,
) -> tuple[TrainState, TrainState | None]:
    """The state before the first step, and its shardings; ``method``: `Hooks.start`."""
    objective, settings = OBJECTIVES[config.objective.name], config.objective.value
    reference, carry = own_reference(config), objective.carry(settings)
    places = None
    if mesh is not None or config.optim.offload:
        own = jax.eval_shape(method, parts.trainable)
        shapes = state.abstract(parts.trainable, optimizer, key, reference, carry, own, fisher)
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        whole = alone if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        ours = jax.tree.map(lambda _: alone, parts.trainable) if mesh is None else parts.shardings
        places = state.shardings(shapes, ours, whole)
        if config.optim.offload:
            paged.check(jax.local_devices()[0], "optim.offload=true")
            places = places._replace(opt_state=paged.places(shapes.opt_state, places.opt_state))
    own = method(parts.trainable)
    return state.create(parts.trainable, optimizer, key, reference, carry, own, places, fisher), places


def own_reference(config: RunConfig) -> bool:
    """Whether the policy as the run began is scored, in each step or of each rollout."""
    asked = OBJECTIVES[config.objective.name].asked(config.objective.value)
    own = config.reference.path is None and not config.reference.precompute
    compared = "reference" in asked.views or "ref_logp" in asked.rollout_needs or config.eval.kl
    return "start" in asked.views or (own and compared)


def virtual(config: RunConfig) -> dict[str, int]:
    """Length of each slot that the methods make: `prompt`, `prefix`."""
    methods = [choice.value for choice in config.peft]
    return {method.slot: method.tokens for method in methods if isinstance(method, peft.Slotted)}


def shares(config: RunConfig) -> bool:
    """Whether the prompt of a pair is computed once in training: noise is scaled by a sequence's own length."""
    return config.data.share_prompts and config.train.neftune_alpha == 0


def loaders(
    config: RunConfig, prepared: Prepared, beside: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Loader, Any]:
    """Endless training batches, and a function that starts the held-out ones anew (None: there are none).

    ``beside``: what stands beside the parts ``train`` and ``held_out``: see `Loader`."""
    rows, reserved = config.train.batch * config.train.accumulate, virtual(config).get("prompt", 0)
    mismatched = "kl" in OBJECTIVES[config.objective.name].asked(config.objective.value).asides
    made = functools.partial(Loader, batch_rows=rows, reserved=reserved, mismatched=mismatched, share=shares(config))
    train = made(prepared.train, config.data, beside=beside.get("train"))
    if prepared.held_out is None:
        return train, None
    fixed = dataclasses.replace(config.data, shuffle=False)
    held = prepared.held_out
    return train, lambda: made(held, fixed, epochs=1, beside=beside.get("held_out"))


def check_tasks(params: tree.Params, *examples: Examples | None) -> None:
    """Raises ValueError for examples of a task that the model has no prompt for."""
    known = slots.tasks(params)
    last = max((int(part.tasks.max(initial=0)) for part in examples if part is not None), default=0)
    if last >= known:
        raise ValueError(
            f"data.task_column: the data have a task {last}; the model has a prompt for {known}, from 0 on. Train with "
            "peft.method=multitask_prompt_tuning and enough peft.tasks, or leave data.task_column out."
        )


def flops_per_token(config: RunConfig, base: Model, parts: Split) -> float:
    """Of forward and backward pass, for utilisation."""
    base_trained = parts.trainable["layers"] is not None and tree.count(parts.trainable) > tree.count(parts.frozen)
    return flops.per_token(base.config, base.names, config.data.max_length, base_trained)
