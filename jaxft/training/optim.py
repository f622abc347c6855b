"""Optimisers by name, from optax, with the schedule, decay mask, groups and clipping around them.

Unusual: layers are stacked, and the update of a stacked layer equals the update of that layer alone (`leafwise`). The
learning rate is a function of the run's step counter, handed to `Optimizer.update`, not of a counter inside the
optimiser's state. Weight decay is decoupled (Loshchilov & Hutter 2019) and goes through the learning rate for every
optimiser; it spares norms, biases and anything that is a vector in one layer.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.core import tree
from jaxft.training import eight_bit, leafwise, paged, penalties, schedules
from jaxft.training.config import OptimConfig
from jaxft.training.leafwise import Stacked

SPARED = re.compile(r"norm(/|$)|(^|/)bias$")  # never decayed, whatever the shape
APART = re.compile(r"^(embed|head|prompt|prefix)(/|$)")  # matrices that Muon leaves to Adam (look-ups and the head)


class Optimizer(NamedTuple):
    """What the step needs of an optimiser."""

    init: Callable[[tree.Params], optax.OptState]
    update: Callable[..., tuple[tree.Params, optax.OptState]]
    """``update(grads, state, params, step, fine=True) -> (what to add to params, state)``; where ``fine`` is False, the
    state as it was"""
    learning_rate: schedules.Schedule
    averaged: Callable[[optax.OptState, tree.Params], tree.Params]
    """``averaged(state, params)``: the parameters to evaluate and export (schedule-free's average; else ``params``)."""
    penalty: penalties.Penalty | None = None
    """What the step adds to gradients before it hands them to ``update``."""


@dataclass(frozen=True)
class Kind:
    """One row of `OPTIMIZERS`."""

    direction: Callable[[OptimConfig, tuple[float, float], Stacked], optax.GradientTransformation]
    """The transformation of gradients before decay and learning rate."""
    betas: tuple[float, float] | None
    rate: float | None
    """Default learning rate as a factor of the fine-tuning method's rate for AdamW; None: there is no default."""
    momentum: bool = True
    """Whether there is a first moment whose dtype can be chosen."""


def _adam(config: OptimConfig, betas: tuple[float, float], rule: Stacked) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=config.eps, mu_dtype=config.momentum_dtype)


def _adam_8bit(config: OptimConfig, betas: tuple[float, float], rule: Stacked) -> optax.GradientTransformation:
    alone = eight_bit.scale_by_adam(*betas, config.eps)
    return leafwise.per_leaf(lambda path, ndim: alone, rule)


def _lion(config: OptimConfig, betas: tuple[float, float], rule: Stacked) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=betas[0], b2=betas[1], mu_dtype=config.momentum_dtype)  # type: ignore[arg-type]


def _sgd(config: OptimConfig, betas: tuple[float, float], rule: Stacked) -> optax.GradientTransformation:
    return optax.trace(decay=betas[0], accumulator_dtype=config.momentum_dtype)


def _schedule_free(config: OptimConfig, betas: tuple[float, float], rule: Stacked) -> optax.GradientTransformation:
    # Adam without its momentum, which the averaging replaces; as optax.contrib.schedule_free_adamw has it
    return optax.scale_by_rms(decay=betas[1], eps=config.eps, eps_in_sqrt=False, bias_correction=True)


def _adafactor(config: OptimConfig, betas: tuple[float, float], rule: Stacked) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, algorithms 4 and 5, with an absolute learning rate (no parameter scale), as HF trains."""
    alone = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return leafwise.per_leaf(lambda path, ndim: alone, rule)


def _muon(config: OptimConfig, betas: tuple[float, float], rule: Stacked) -> optax.GradientTransformation:
    """Jordan 2024; updates scaled to Adam's size, 0.2 sqrt(max(in, out)), as in Liu et al. 2025, eq. 4."""
    matrix = optax.chain(
        optax.contrib.scale_by_muon(beta=betas[0], mu_dtype=config.momentum_dtype),
        optax.stateless(_size_of_adam),
    )
    other = _adam(config, (0.9, betas[1]), rule)
    return leafwise.per_leaf(lambda path, ndim: matrix if ndim == 2 and not APART.search(path) else other, rule)


def _size_of_adam(update: Any, params: Any) -> Any:
    return 0.2 * max(update.shape) ** 0.5 * update


OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(_adam, betas=(0.9, 0.999), rate=1.0),
    "adamw_8bit": Kind(_adam_8bit, betas=(0.9, 0.999), rate=1.0, momentum=False),
    "adafactor": Kind(_adafactor, betas=None, rate=1.0, momentum=False),
    "lion": Kind(_lion, betas=(0.9, 0.99), rate=0.2),
    "muon": Kind(_muon, betas=(0.95, 0.999), rate=1.0),
    "schedule_free": Kind(_schedule_free, betas=(0.9, 0.999), rate=1.0, momentum=False),
    "sgd": Kind(_sgd, betas=(0.9, 0.0), rate=None),
}


def make(
    config: OptimConfig,
    trainable: tree.Params,
    total_steps: int,
    default_lr: float = 2e-4,
    factors: tree.Params | None = None,
    stacked: Stacked = leafwise.stacked,
    peak_lr: Any = None,
) -> Optimizer:
    """The optimiser for a tree of trainable arrays (or their shapes). Refuses what it cannot do.

    Args:
      trainable: the trainable part of the parameters, ``None`` elsewhere.
      total_steps: steps of the run, which the schedule spans.
      default_lr: the fine-tuning method's rate for AdamW, used where ``config.lr`` is not given.
      factors: of the learning rate, for each trainable array, besides ``config.groups``.
      stacked: path -> number of leading axes that count layers.
      peak_lr: peak learning rate in place of the config's, a traced number too.
    """
    kind = _check(config)
    rate = schedules.make(
        _schedule(config), peak(config, default_lr) if peak_lr is None else peak_lr, total_steps,
        _warmup(config, total_steps), config.min_lr_ratio, config.decay_ratio,
    )  # fmt: skip
    groups = multipliers(config.groups, trainable)
    factors = groups if factors is None else jax.tree.map(lambda g, f: g * f, groups, factors)
    head = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    body = [kind.direction(config, config.betas or kind.betas or (0.0, 0.0), stacked)]
    if config.weight_decay:
        body.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask(trainable, stacked)))
    if config.name == "schedule_free":
        b1 = (config.betas or kind.betas or (0.9, 0.999))[0]
        made = _averaging(head, optax.chain(*body), b1, rate, factors)
    else:
        direction = optax.chain(head, *body)

        def update(grads: tree.Params, state: optax.OptState, params: tree.Params, step: jax.Array):
            updates, state = direction.update(grads, state, params)
            return _scaled(updates, rate(step), factors), state

        made = Optimizer(direction.init, _kept(update), rate, lambda state, params: params)
    made = made._replace(penalty=penalties.make(config))
    if not config.offload:
        return made
    alone = dataclasses.replace(config, offload=False, clip_norm=None, groups={})

    def part(one: tree.Params) -> Optimizer:
        own = jax.tree.map(lambda p, f: None if p is None else f, one, factors, is_leaf=lambda x: x is None)
        return make(alone, one, total_steps, default_lr, own, stacked, peak_lr)

    return made._replace(update=paged.one_by_one(head, part))


def _kept(update: Callable) -> Callable:
    """`Optimizer.update` that leaves the state as it was where ``fine`` is False."""

    def kept(grads: tree.Params, state: Any, params: tree.Params, step: jax.Array, fine: Any = True):
        updates, after = update(grads, state, params, step)
        return updates, jax.tree.map(lambda a, b: jnp.where(fine, a, b), after, state)

    return kept


def _averaging(
    head: optax.GradientTransformation,
    body: optax.GradientTransformation,
    b1: float,
    rate: schedules.Schedule,
    factors: tree.Params,
) -> Optimizer:
    """Schedule-free averaging around ``body`` (Defazio et al. 2024, arXiv:2405.15682), the rate handed in each step."""

    def around(now: jax.Array) -> optax.GradientTransformation:
        scale = optax.stateless(lambda updates, params: _scaled(updates, now, factors))
        return optax.contrib.schedule_free(optax.chain(body, scale), learning_rate=now, b1=b1)

    def init(params: tree.Params) -> optax.OptState:
        return head.init(params), around(jnp.zeros((), jnp.float32)).init(params)

    def update(grads: tree.Params, state: Any, params: tree.Params, step: jax.Array):
        grads, first = head.update(grads, state[0], params)
        updates, second = around(rate(step)).update(grads, state[1], params)
        return updates, (first, second)

    def averaged(state: Any, params: tree.Params) -> tree.Params:
        here = jax.device_put(state[1], jax.memory.Space.Device)  # from the host's memory, if it is there (`paged`)
        return optax.contrib.schedule_free_eval_params(here, params)

    return Optimizer(init, _kept(update), rate, averaged)


def _scaled(updates: tree.Params, rate: jax.Array, factors: tree.Params) -> tree.Params:
    return jax.tree.map(lambda u, f: -rate * f * u, updates, factors)


def decay_mask(trainable: tree.Params, stacked: Stacked = leafwise.stacked) -> tree.Params:
    """True for what weight decay applies to: matrices of one layer that are no part of a norm."""

    def decays(path: Any, leaf: jax.Array) -> bool:
        where = tree.join(path)
        return leaf.ndim - stacked(where) >= 2 and not SPARED.search(where)

    return jax.tree_util.tree_map_with_path(decays, trainable)


def multipliers(groups: dict[str, float], trainable: tree.Params) -> tree.Params:
    """The learning-rate factor of each array. Raises ValueError naming a pattern that no trainable array matches."""
    known = [path for path, _ in tree.paths(trainable)]
    for pattern in groups:
        if not any(re.search(pattern, path) for path in known):
            some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ValueError(f"optim.groups: {pattern!r} matches no trainable parameter. They are: {some}")

    def factor(path: Any, leaf: jax.Array) -> float:
        where = tree.join(path)
        return next((float(f) for pattern, f in groups.items() if re.search(pattern, where)), 1.0)

    return jax.tree_util.tree_map_with_path(factor, trainable)


def peak(config: OptimConfig, default_lr: float) -> float:
    """The peak learning rate: ``config.lr``, or the method's own adapted to the optimiser."""
    if config.lr is not None:
        return config.lr
    factor = OPTIMIZERS[config.name].rate
    if factor is None:
        raise ValueError(f"optim.lr: {config.name} has no default learning rate; give one, for example optim.lr=0.01")
    return default_lr * factor


def _schedule(config: OptimConfig) -> schedules.Name:
    return config.schedule or ("constant" if config.name == "schedule_free" else "cosine")


def _warmup(config: OptimConfig, total_steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_ratio * total_steps)


def _check(config: OptimConfig) -> Kind:
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optim.name: got {config.name!r}; expected one of {', '.join(OPTIMIZERS)}")
    kind = OPTIMIZERS[config.name]
    if config.betas is not None and kind.betas is None:
        raise ValueError(f"optim.betas: {config.name} has no such moments; leave betas out")
    if config.momentum_dtype != "float32" and not kind.momentum:
        raise ValueError(
            f"optim.momentum_dtype: {config.name} keeps no first moment in a dtype to choose; leave it out"
        )
    if config.name == "schedule_free" and config.schedule not in (None, "constant"):
        raise ValueError(
            f"optim.schedule: got {config.schedule!r}; schedule_free averages instead of decaying: leave it out"
        )
    return kind
