r"""Bottleneck adapters: small networks inside every layer, after a sub-layer or beside it.

.. math:: f(h) = s\,\big(\sigma(h D + c)\,U + d\big)

With x the residual stream before the feed-forward block, a and m what attention and feed-forward add to it:

- Houlsby et al. 2019, section 2.1 (arXiv:1902.00751): attention adds :math:`a + f_1(a)`, the feed-forward block
  :math:`m + f_2(m)`. Each is a weight around an output projection, its bias included.
- Pfeiffer et al. 2021, "AdapterFusion", section 5.1 (arXiv:2005.00247): one network, which reads the stream after the
  feed-forward block: :math:`x + m + f(x + m)`.
- He et al. 2022, table 2, scaled parallel adapter (arXiv:2110.04366): :math:`x + m + s\,f(x)`.

The papers' models normalise after each addition; ours before each block. As in AdapterHub's ``adapters`` on such models
(``double_seq_bn``, ``seq_bn``, ``par_bn``: the reference for defaults and initialisation, as peft has none of these),
nothing is normalised between the stream and the network, and the network has no norm of its own. Where a family
normalises a block's output, Houlsby's networks stand before that norm.

With width r of the network and D of the model, a network trains 2 D r + r + D parameters; Houlsby has two a layer.
None is a map on a weight, so none can be merged. The last two have a place of their own in a layer, which the decoder
reads: ``layers/adapter`` and ``layers/parallel_adapter``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxft.core import products, tree
from jaxft.core.names import Names
from jaxft.core.weight import Slot, Weight, parameter, static, trainable, weight
from jaxft.peft.sites import Site, Targeted

ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all bottleneck adapters can set."""

    reduction_factor: float = 16.0
    """Width of the model divided by that of the network."""
    activation: Literal["relu", "silu", "gelu"] = "relu"
    """Between the two projections."""
    scale: float = 1.0
    """Factor s of what the network adds."""
    dropout: float = 0.0
    """Probability of zeroing what the network adds, feature by feature, while training."""
    init: Literal["normal", "zero"] = "normal"
    """normal: both projections with deviation 0.02, so the start is only near the identity; zero: the first uniform
    within 1/sqrt(in), the second zero, so it is the identity."""

    def __post_init__(self) -> None:
        good = {"reduction_factor": self.reduction_factor > 0, "dropout": 0.0 <= self.dropout < 1.0}
        for field, fine in good.items():
            if not fine:
                expected = "reduction_factor > 0, 0 <= dropout < 1"
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Houlsby(Sizes, Targeted):
    """Networks after attention and after the feed-forward block. Default learning rate 3e-4."""

    targets: str | tuple[str, ...] = ("attn/o", "mlp/down")
    """Modules whose output a network reads: torch names (o_proj, ...), our paths, or a full-match regex."""
    activation: Literal["relu", "silu", "gelu"] = "silu"
    """Between the two projections."""

    outside: ClassVar[bool] = True

    def wrap(self, site: Site) -> "HoulsbyWeight":
        return HoulsbyWeight(base=site.base, **_fields(self, site.key, site.shape[1], site.gate))


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Sizes):
    """A network after the feed-forward block of each layer. Default learning rate 3e-4."""

    layers: tuple[int, ...] | None = None
    """Layer indices to adapt; default: all."""

    slot: ClassVar[str] = "adapter"


@dataclass(frozen=True, kw_only=True)
class Parallel(Sizes):
    """A network beside the feed-forward block of each layer. Default learning rate 3e-4."""

    reduction_factor: float = 2.0
    """Width of the model divided by that of the network."""
    scale: float = 4.0
    """Factor s of what the network adds."""
    init: Literal["normal", "zero"] = "zero"
    """normal: both projections with deviation 0.02, so the start is only near the identity; zero: the first uniform
    within 1/sqrt(in), the second zero, so it is the identity."""
    layers: tuple[int, ...] | None = None
    """Layer indices to adapt; default: all."""

    slot: ClassVar[str] = "parallel_adapter"


@weight
class Network:
    """The fields of f. down: [*stack, D, r]; up: [*stack, r, D]; scale and gate: float32[*stack]."""

    down: jax.Array = trainable()
    down_bias: jax.Array = trainable()
    up: jax.Array = trainable()
    up_bias: jax.Array = trainable()
    scale: jax.Array
    gate: jax.Array
    key: jax.Array | None = None
    rate: float = static(default=0.0)
    activation: str = static(default="relu")

    mergeable: ClassVar[bool] = False

    def _added(self, h: jax.Array) -> jax.Array:
        """f(h) in the dtype of ``h``."""
        dtype = h.dtype
        z = checkpoint_name(h @ self.down.astype(dtype) + self.down_bias.astype(dtype), "adapter")
        y = ACTIVATIONS[self.activation](z) @ self.up.astype(dtype) + self.up_bias.astype(dtype)
        return products.dropped(y * (self.scale * self.gate).astype(dtype), self.key, self.rate)

    def axes(self, names: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        stack, width = names[:-2], names[-1]
        return super().axes(names) | {"down": (*stack, width, None), "up": (*stack, None, width)}  # type: ignore[misc]


@weight
class HoulsbyWeight(Network, Weight):
    """``y + f(y)`` with ``y = x @ base``."""

    base: Any = parameter(default=None)

    def __rmatmul__(self, x):
        y = x @ self.base
        return y + self._added(y)


@weight
class Bottleneck(Network, Slot):
    """``x @ w`` is f(x), for a layer to add to its residual stream."""

    @property
    def shape(self):
        return (*self.down.shape[:-1], self.up.shape[-1])

    def __rmatmul__(self, x):
        return self._added(x)


def adapt(params: tree.Params, names: Names, key: jax.Array, config: Pfeiffer | Parallel) -> tree.Params:
    """The parameters with a network in the slot of each layer. Raises ValueError if they have one there, and for layers
    that the model does not have."""
    del names
    layers, path = tree.num_layers(params), f"layers/{config.slot}"
    chosen = range(layers) if config.layers is None else config.layers
    wrong = [i for i in chosen if not 0 <= i < layers]
    if wrong or not chosen:
        raise ValueError(f"peft.layers: got {list(chosen)}; expected indices from 0 to {layers - 1}")
    if config.slot in params["layers"]:
        raise ValueError(f"peft: the model has {path} already; expected {type(config).__name__} once")
    gate = jnp.asarray(np.isin(np.arange(layers), list(chosen)), jnp.float32)
    fields = _fields(config, key, params["embed"]["tokens"].shape[-1], gate)
    return tree.replace(params, path, Bottleneck(**fields))


def _fields(config: Sizes, key: jax.Array, width: int, gate: jax.Array) -> dict[str, Any]:
    """The fields of `Network` at the start, float32, stacked like ``gate``."""
    stack, narrow = gate.shape, max(1, int(width // config.reduction_factor))
    down, up = (*stack, width, narrow), (*stack, narrow, width)
    first, second = jax.random.split(key)
    if config.init == "normal":
        drawn = 0.02 * jax.random.normal(first, down), 0.02 * jax.random.normal(second, up)
    elif config.init == "zero":
        drawn = jax.random.uniform(first, down, minval=-1.0, maxval=1.0) / np.sqrt(width), jnp.zeros(up)
    else:
        raise ValueError(f"peft.init: got {config.init!r}; expected normal or zero")
    return {
        "down": drawn[0],
        "down_bias": jnp.zeros((*stack, narrow)),
        "up": drawn[1],
        "up_bias": jnp.zeros((*stack, width)),
        "scale": jnp.full(stack, config.scale),
        "gate": gate,
        "rate": config.dropout,
        "activation": config.activation,
    }
