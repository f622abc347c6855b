r"""Prefix tuning: n learnt keys and values in every layer's attention, before those of the text.

.. math:: \mathrm{head} = \mathrm{softmax}\big(q\,[K_P; K]^\top / \sqrt{d}\big)\,[V_P; V], \qquad
          [K_P; V_P] = P \ \text{ or } \ \tanh(X W_1 + b_1)\,W_2 + b_2

Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", section 4 and (the projection, which
steadies training) 4.3 (arXiv:2101.00190). The keys are used as they are, without a rotation; the text follows at
positions n, n+1, ... With d = K H the width of a layer's keys it trains n 2 L d parameters; with the projection of
width h, n d + (d + 1) h + (h + 1) 2 L d. Saved for peft, only the keys and values are left.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.weight import Slot, static, trainable, weight
from jaxft.peft import encoders, slot_formats, slots
from jaxft.peft.disk import AdapterError
from jaxft.peft.encoders import Layers
from jaxft.peft.slot_formats import ROWS, SlotFormat
from jaxft.peft.slots import Host, Slotted


@dataclass(frozen=True)
class PrefixTuning(Slotted):
    """Learnt keys and values in every layer. Default learning rate 3e-2, with the projection 3e-3."""

    projection: bool = False
    """Whether a network of two layers makes the keys and values from learnt inputs."""
    hidden: int | None = None
    """Width of that network; default: that of the model."""
    init: Literal["random", "zero"] = "random"
    """Keys and values to begin with: standard normal (with the projection: what its random weights give), or zero."""

    slot: ClassVar[str] = slots.PREFIX

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None and (self.hidden < 1 or not self.projection):
            raise ValueError(f"peft.hidden: got {self.hidden}; expected at least 1, and projection=true with it")

    def make(self, model: Host, params: tree.Params, key: jax.Array) -> Slot:
        sizes = (model.config.num_layers, model.config.num_kv_heads, model.config.head_dim)
        narrow = sizes[1] * sizes[2]
        wide = 2 * sizes[0] * narrow
        if not self.projection:
            return Prefix(_started(self, jax.random.normal(key, (self.tokens, wide))), sizes)
        inputs_key, encoder_key = jax.random.split(key)
        encoder = encoders.linears(encoder_key, (narrow, self.hidden or slot_formats.features(params), wide))
        encoder["1"] = _started(self, encoder["1"])
        return Prefix(jax.random.normal(inputs_key, (self.tokens, narrow)), sizes, encoder)


@weight
class Prefix(Slot):
    """``inputs`` float32[n, 2 L d], or with an ``encoder`` [n, d] and two linear layers to 2 L d."""

    inputs: jax.Array = trainable()
    sizes: tuple[int, int, int] = static()
    """Layers L, key heads K, head dimension H."""
    encoder: Layers | None = trainable(default=None)

    @property
    def shape(self):
        layers, heads, width = self.sizes
        return (layers, 2, self.inputs.shape[-2], heads, width)

    def rows(self) -> jax.Array:
        """float32[n, 2 L d], as peft stores it: key and value of the first layer, then of the next."""
        return encoders.mlp(self.encoder or {}, self.inputs, jnp.tanh)

    def dense(self):
        layers, heads, width = self.sizes
        rows = self.rows().reshape(-1, layers, 2, heads, width)
        return jnp.transpose(rows, (1, 2, 0, 3, 4))


def groups(config: PrefixTuning) -> dict[str, float]:
    """The network's weights want smaller steps than keys and values themselves."""
    return {r"^prefix/": 0.1} if config.projection else {}


def _started(config: PrefixTuning, made: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, made) if config.init == "zero" else made


def _described(w: Prefix) -> tuple[dict[str, Any], dict[str, Any]]:
    _, heads, width = w.sizes
    fields = {"token_dim": heads * width, "num_attention_heads": heads, "prefix_projection": bool(w.encoder)}
    fields |= {"encoder_hidden_size": w.encoder["0"]["bias"].shape[0]} if w.encoder else {}
    return fields, {ROWS: w.rows()}


def _refuse(where: object, config: dict[str, Any]) -> None:
    heads, width = config.get("num_attention_heads"), config.get("token_dim")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1 or width % heads:
        expected = "how many heads share a key of how many features"
        raise AdapterError(f"{where}: num_attention_heads, token_dim", f"{heads!r}, {width!r}", expected)


def _shapes(config: dict[str, Any], params: tree.Params) -> slot_formats.Shapes:
    wide = 2 * config["num_layers"] * slot_formats.key_features(params)
    return {ROWS: (config.get("num_virtual_tokens"), wide)}


def _read(config: dict[str, Any], tensors: dict[str, Any]) -> Prefix:
    heads = config["num_attention_heads"]
    return Prefix(tensors[ROWS], (config["num_layers"], heads, config["token_dim"] // heads))


FORMAT = SlotFormat(
    peft_type="PREFIX_TUNING",
    leaf=Prefix,
    place=slots.PREFIX,
    own=("prefix_projection", "encoder_hidden_size", "init_weights"),
    shapes=_shapes,
    write=_described,
    read=_read,
    refuse=_refuse,
)
