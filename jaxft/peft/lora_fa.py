r"""LoRA-FA: LoRA with A frozen, and the gradient of B turned into that of the whole update.

.. math:: y = x W + s\,(x A) B, \qquad g_B \leftarrow \frac{1}{s^2}\,(A^\top A)^{-1} g_B

Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation" (arXiv:2308.03303); the second equation, with A in
our [in, r], is what peft's ``LoraFAOptimizer`` does before Adam: the step of B whose A B is nearest to the step that
all of W would take. r out parameters. The input of an adapted layer need not be kept for the backward pass, only
x A of width r: with A out of the trained tree, differentiation leaves it away by itself.

Unusual: the second equation is the derivative of the weight, not a part of the optimiser, so it holds for any of them.
On disk it is a LoRA like any other, and is read back as one.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.weight import Weight, weight
from jaxft.peft import lora_hf
from jaxft.peft.disk import Tensors
from jaxft.peft.lora import LoRA, LoRAWeight
from jaxft.peft.sites import Site

DAMPING = 1e-8  # peft's


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA with A frozen. Default learning rate 5e-4. Every other setting is LoRA's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "a_zero":
            raise ValueError("peft.init: got 'a_zero'; LoRA-FA never moves A, expected an init that draws it")

    def wrap(self, site: Site) -> Weight:
        if site.name.kind == "embedding":
            raise ValueError(
                f"peft.targets: {site.name.module} is an embedding, whose A begins at zero and would stay there; leave "
                "it out of targets, or train it whole with peft.modules_to_save"
            )
        w = LoRAWeight(**self.fields(site))
        fields = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
        return LoRAFAWeight(**fields, inverse=inverse(w.a, w.scale))


@weight
class LoRAFAWeight(LoRAWeight):
    """As LoRAWeight, with ``a`` frozen. ``inverse``: (A^T A)^-1 / scale^2, [*stack, r, r]."""

    a: jax.Array
    inverse: jax.Array | None = None

    @property
    def _b(self):
        return _whole_step(self.b, self.inverse)

    def axes(self, names):
        return {**super().axes(names), "inverse": (*names[:-2], None, None)}


@jax.custom_vjp
def _whole_step(b, inverse):
    del inverse
    return b


_whole_step.defvjp(lambda b, inverse: (b, inverse), lambda inverse, g: (inverse @ g, None))


def inverse(a: jax.Array, scale: jax.Array) -> jax.Array:
    """(A^T A)^-1 / scale^2, float32[*stack, r, r]: 1 on the diagonal of padding, 0 where the scale is."""
    gram = jnp.swapaxes(a, -1, -2) @ a
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    damped = gram + jnp.where(diagonal > 0, DAMPING, 1.0)[..., None, :] * jnp.eye(a.shape[-1])
    return jnp.linalg.inv(damped) * jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1) ** 2, 0)[..., None, None]


def read(w: LoRAFAWeight, tensors: Tensors) -> LoRAFAWeight:
    """One layer with its factors."""
    w = lora_hf.read(w, tensors)
    return dataclasses.replace(w, inverse=np.asarray(inverse(jnp.asarray(w.a), jnp.asarray(w.scale))))


FORMAT = dataclasses.replace(lora_hf.FORMAT, leaf=LoRAFAWeight, read=read, claims=lambda config: False)
