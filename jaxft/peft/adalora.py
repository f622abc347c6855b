r"""AdaLoRA: a low-rank update in the form of a singular value decomposition, its ranks given to where they matter.

.. math:: y = x W + s\,\big((x A) \circ e\big)\,B, \qquad s = \alpha / r_0

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (arXiv:2303.10512). All
matrices begin with rank r_0 (``init_rank``) and end with the average rank ``rank``. In every step a triplet (a column
of A, a singular value of e, a row of B) has the importance of eq. 7: that of its value plus the mean of those of its
column and row, each the product of smoothed sensitivity :math:`|w\,\partial L/\partial w|` (eq. 8, 9) and smoothed
uncertainty (eq. 10, 11). Of all triplets of all layers those of least importance get singular value 0, so many that the
budget of eq. 12 is kept: all until ``initial_steps``, then falling with the cube of what is left, then constant for
``final_steps`` with the last choice. Until then a pruned value may come back. A and B are kept near orthonormal by a
penalty, the mean of :math:`\lVert A^\top A - I\rVert_F` and :math:`\lVert B B^\top - I\rVert_F` over all matrices
(eq. 4, as peft has it), whose gradient is added to that of the loss.

A module trains r_0 (in + out + 1) parameters. In peft's format only triplets that are left are stored, and the scale is
:math:`\alpha / (r_0 + 10^{-5})` as there. Differs from peft: the length of the run is known, so the two phases have
defaults; a budget that prunes nothing is no error; importance is of the gradient before clipping.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxft.core import products, tree, verbs
from jaxft.core.hooks import Hooks
from jaxft.core.weight import Weight, parameter, static, trainable, weight
from jaxft.peft.sites import Site, Targeted


@dataclass(frozen=True)
class AdaLoRA(Targeted):
    """Low-rank adaptation with ranks shared out by importance. Default learning rate 1e-3."""

    rank: int = 8
    """Average rank of all adapted matrices at the end."""
    init_rank: int = 12
    """Rank of each at the beginning."""
    alpha: float | None = None
    """Numerator of the scale, whose denominator is init_rank; default: twice init_rank."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of the adapter while training."""
    initial_steps: int | None = None
    """Steps before the first pruning; default: a tenth of the run."""
    final_steps: int | None = None
    """Steps after the last pruning; default: three tenths of the run."""
    every: int = 1
    """Steps from one pruning to the next."""
    sensitivity_decay: float = 0.85
    """Of the running average of the sensitivity (beta 1)."""
    uncertainty_decay: float = 0.85
    """Of the running average of the uncertainty (beta 2)."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps A and B orthonormal."""

    def __post_init__(self) -> None:
        good = {
            "rank": 1 <= self.rank <= self.init_rank,
            "dropout": 0.0 <= self.dropout < 1.0,
            "initial_steps": (self.initial_steps or 0) >= 0,
            "final_steps": (self.final_steps or 0) >= 0,
            "every": self.every >= 1,
            "sensitivity_decay": 0.0 < self.sensitivity_decay < 1.0,
            "uncertainty_decay": 0.0 < self.uncertainty_decay < 1.0,
            "orthogonality": self.orthogonality >= 0.0,
        }
        for field, fine in good.items():
            if not fine:
                expected = "1 <= rank <= init_rank, 0 <= dropout < 1, steps and orthogonality >= 0, every >= 1, decays"
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected {expected} between 0 and 1")

    def wrap(self, site: Site) -> "AdaLoRAWeight":
        rows, columns = site.shape
        stack, first, second = site.layers.shape, *jax.random.split(site.key)
        alpha = 2.0 * self.init_rank if self.alpha is None else self.alpha
        real = site.gate[..., None, None]
        return AdaLoRAWeight(
            base=site.base,
            a=0.02 * jax.random.normal(first, (*stack, rows, self.init_rank)) * real,
            e=jnp.zeros((*stack, self.init_rank)),
            b=0.02 * jax.random.normal(second, (*stack, self.init_rank, columns)) * real,
            scale=jnp.full(stack, alpha / (self.init_rank + 1e-5)),
            gate=site.gate,
            rate=self.dropout,
        )


@weight
class AdaLoRAWeight(Weight):
    """``x @ base + scale * gate * ((x @ a) * e) @ b``. a: [*stack, in, r]; e: [*stack, r]; b: [*stack, r, out]."""

    base: Any = parameter()
    a: jax.Array = trainable()
    e: jax.Array = trainable()
    b: jax.Array = trainable()
    scale: jax.Array
    gate: jax.Array
    key: jax.Array | None = None
    rate: float = static(default=0.0)

    @property
    def _values(self) -> jax.Array:
        """float32[*stack, r]: the singular values with the scale."""
        return self.e.astype(jnp.float32) * (self.scale * self.gate)[..., None]

    def __rmatmul__(self, x):
        low = checkpoint_name(products.dropped(x, self.key, self.rate) @ self.a.astype(x.dtype), "adapter")
        return x @ self.base + (low * self._values.astype(x.dtype)) @ self.b.astype(x.dtype)

    def ragged_dot(self, x, group_sizes):
        a = (self.a * self._values[..., None, :]).astype(x.dtype)
        low = jax.lax.ragged_dot(products.dropped(x, self.key, self.rate), a, group_sizes)
        added = jax.lax.ragged_dot(low, self.b.astype(x.dtype), group_sizes)
        return verbs.ragged_dot(x, self.base, group_sizes) + added

    def axes(self, names):
        stack, (rows, columns) = names[:-2], names[-2:]
        return super().axes(names) | {"a": (*stack, rows, None), "b": (*stack, None, columns)}


class Importance(NamedTuple):
    """What the budget is shared out by: the state of a run. Trees like the trained fields, by path."""

    sensitivity: dict[str, AdaLoRAWeight]
    uncertainty: dict[str, AdaLoRAWeight]
    kept: dict[str, jax.Array]
    """bool[*stack, r]: the triplets that the last pruning left."""
    settled: jax.Array
    """bool[]: whether the last pruning of the run was done."""


def hooks(config: AdaLoRA, params: tree.Params, steps: int) -> Hooks:
    """Penalty, importance and pruning for a run of ``steps`` steps on ``params``.

    Raises ValueError if the run leaves no step for pruning."""
    gates = {path: np.asarray(w.gate) for path, w in _found(params).items()}
    budgets = schedule(config, sum(int(gate.sum()) for gate in gates.values()), steps)
    table, last = jnp.asarray(budgets), len(budgets) - 1

    def start(trainable: tree.Params) -> Importance:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), _found(trainable))
        kept = {path: jnp.ones(w.e.shape, bool) for path, w in _found(trainable).items()}
        return Importance(zeros, zeros, kept, jnp.bool_(False))

    def gradients(trainable: tree.Params, grads: tree.Params) -> tree.Params:
        weights, weight = _found(trainable), config.orthogonality
        factor = weight / (2 * sum(gate.sum() for gate in gates.values()))

        def add(path: str, grad: AdaLoRAWeight) -> AdaLoRAWeight:
            w, gate = weights[path], factor * gates[path][..., None, None]
            b = jnp.swapaxes(w.b, -1, -2)
            penalty = gate * _penalty_gradient(w.a), gate * jnp.swapaxes(_penalty_gradient(b), -1, -2)
            return dataclasses.replace(grad, a=grad.a + penalty[0], b=grad.b + penalty[1])

        return _replaced(grads, add)

    def update(step: jax.Array, trainable: tree.Params, grads: tree.Params, state: Importance):
        measured = _measured(config, _found(trainable), _found(grads), state)
        state = jax.tree.map(lambda new, old: jnp.where(step < last, new, old), measured, state)
        budget = table[jnp.minimum(step, last)]
        due = jnp.where(step < last, budget >= 0, ~state.settled)
        chosen = allocate({path: _scores(state, path) for path in gates}, gates, budget)
        kept = {path: jnp.where(due, chosen[path], state.kept[path]) for path in gates}
        state = state._replace(kept=kept, settled=step >= last)
        free = (step < last) & ~due

        def prune(path: str, w: AdaLoRAWeight) -> AdaLoRAWeight:
            return dataclasses.replace(w, e=jnp.where(kept[path] | free, w.e, 0.0))

        return _replaced(trainable, prune), state

    return Hooks(start, gradients, update)


def schedule(config: AdaLoRA, matrices: int, steps: int) -> np.ndarray:
    """int32[last + 1]: triplets that pruning in each step leaves, -1 in a step without; ``last`` is the last pruning.

    Eq. 12, rounded down as in peft. Raises ValueError if no step is left for pruning."""
    initial = steps // 10 if config.initial_steps is None else config.initial_steps
    final = 3 * steps // 10 if config.final_steps is None else config.final_steps
    last = steps - final
    if initial >= last:
        raise ValueError(
            f"peft.initial_steps: got {initial}, with final_steps {final} in a run of {steps} steps; expected fewer, "
            "since AdaLoRA prunes between the two"
        )
    first, end = config.init_rank * matrices, config.rank * matrices
    budgets = np.full(last + 1, -1, np.int32)
    for step in range(initial + 1, last + 1):
        if step % config.every == 0 or step == last:
            left = 1 - (step - initial) / (last - initial)
            budgets[step] = int((first - end) * left**3 + end)
    return budgets


def allocate(scores: dict[str, jax.Array], gates: dict[str, np.ndarray], budget: jax.Array) -> dict[str, jax.Array]:
    """bool[*stack, r] by path: the ``budget`` most important triplets of all adapted layers; of equals, none."""
    real = {path: np.broadcast_to(gate[..., None] > 0, scores[path].shape) for path, gate in gates.items()}
    flat = jnp.concatenate([jnp.where(real[path], score, jnp.inf).ravel() for path, score in scores.items()])
    pruned = sum(int(hits.sum()) for hits in real.values()) - budget
    threshold = jnp.where(pruned > 0, jnp.sort(flat)[jnp.maximum(pruned, 1) - 1], -jnp.inf)
    return {path: score > threshold for path, score in scores.items()}


def _measured(config: AdaLoRA, weights: dict, grads: dict, state: Importance) -> Importance:
    """The running averages with this step's in them."""
    first, second = config.sensitivity_decay, config.uncertainty_decay
    now = jax.tree.map(lambda p, g: jnp.abs(p * g), weights, grads)
    smooth = jax.tree.map(lambda old, new: first * old + (1 - first) * new, state.sensitivity, now)
    off = jax.tree.map(lambda new, mean: jnp.abs(new - mean), now, smooth)
    spread = jax.tree.map(lambda old, new: second * old + (1 - second) * new, state.uncertainty, off)
    return state._replace(sensitivity=smooth, uncertainty=spread)


def _scores(state: Importance, path: str) -> jax.Array:
    """float32[*stack, r]: the importance of each triplet."""
    each = jax.tree.map(jnp.multiply, state.sensitivity[path], state.uncertainty[path])
    return each.e + jnp.mean(each.a, axis=-2) + jnp.mean(each.b, axis=-1)


def _penalty_gradient(p: jax.Array) -> jax.Array:
    """Of the Frobenius norm of ``p.T @ p - I``, layer by layer; p: [*stack, n, r]."""
    excess = jnp.matmul(jnp.swapaxes(p, -1, -2), p, precision="highest") - jnp.eye(p.shape[-1])
    norm = jnp.linalg.norm(excess, axis=(-2, -1), keepdims=True)
    return 2 * jnp.matmul(p, excess, precision="highest") / jnp.where(norm > 0, norm, 1.0)


def _is_mine(w: Any) -> bool:
    return isinstance(w, AdaLoRAWeight)


def _found(params: tree.Params) -> dict[str, Any]:
    """Every adapter in a tree of parameters or of what trains, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_mine)[0]
    return {tree.join(path): w for path, w in leaves if _is_mine(w)}


def _replaced(params: tree.Params, fn: Any) -> tree.Params:
    """The tree with ``fn(path, weight)`` in place of every adapter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: fn(tree.join(path), w) if _is_mine(w) else w, params, is_leaf=_is_mine
    )
