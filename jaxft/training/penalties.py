r"""Penalties on the trained arrays that hold them near where the run began: gradients added before clipping.

.. math:: P(\theta) = \frac{\lambda}{2} \sum_i (\theta_i - \theta^*_i)^2 \text{ (l2\_start)}, \qquad
          P(\theta) = \frac{\lambda}{2} \sum_i F_i (\theta_i - \theta^*_i)^2 \text{ (ewc)}

l2_start is L2-SP, Li et al. 2018 (arXiv:1802.01483); ewc is Kirkpatrick et al. 2017, eq. 3 (arXiv:1612.00796), whose F
`fisher.estimate` measures. Both are exact in the arrays that train, start being what these were before the first step.
For full fine-tuning that is all there is to it. For adapters the arrays are factors: what holds them near their start
holds the weight's change only by a bound, |AB| <= |A| |B| for a LoRA. Its F is that of the factors at the start, where
B = 0: nothing there depends on A, whose F is 0, and B's was measured with the A of the start, which may move away. It
stays exact where the weight is linear in what trains, as with A frozen (lora_fa).

The penalties are metrics of their own and no part of ``loss``, by which runs are compared.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxft.core import tree
from jaxft.training.config import OptimConfig

Penalty = Callable[..., tuple[tree.Params, dict[str, jax.Array]]]
"""``penalty(params, grads, start, fisher) -> (grads, metrics)``: trees of one structure; ``fisher`` may be None where
there is no ewc; metrics are float32 scalars."""


def make(config: OptimConfig) -> Penalty | None:
    """The penalties that the config asks for, all as one; None: there are none."""
    strengths = {name: value for name in ("l2_start", "ewc") if (value := getattr(config, name))}
    if not strengths:
        return None

    def penalty(
        params: tree.Params, grads: tree.Params, start: tree.Params, fisher: tree.Params | None
    ) -> tuple[tree.Params, dict[str, jax.Array]]:
        moved, metrics = jax.tree.map(jnp.subtract, params, start), dict[str, jax.Array]()
        for name, strength in strengths.items():
            if name == "ewc" and fisher is None:
                raise ValueError("optim.ewc: the state holds no Fisher information; see fisher.estimate, state.create")
            pull = moved if name == "l2_start" else jax.tree.map(jnp.multiply, fisher, moved)
            grads = jax.tree.map(lambda g, p: g + strength * p, grads, pull)  # noqa: B023 (used at once)
            metrics[f"penalty/{name}"] = 0.5 * strength * jnp.float32(optax.tree.vdot(pull, moved))
        return grads, metrics

    return penalty
