r"""P-tuning: prompt tuning whose rows are made by a small network from learnt inputs, which is trained with them.

.. math:: P = \mathrm{MLP}(X) \quad \text{or} \quad P = \mathrm{MLP}(\mathrm{BiLSTM}(X)), \qquad
          X \in \mathbb{R}^{n \times D}

Liu et al. 2021, "GPT Understands, Too", section 3.2 (arXiv:2103.10385). With h = `hidden`, the MLP trains
n D + (D + 1) h + (h + 1) h + (h + 1) D parameters; the LSTM of l layers
n D + 8 h (D + h + 1) + (l - 1) 8 h (3 h + 1) + (2 h + 1) 2 h + (2 h + 1) D. Saved for peft, only the rows are left: the
network stays in the training state, from which a run goes on exactly.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxft.core import tree
from jaxft.core.weight import Slot, static, trainable, weight
from jaxft.peft import encoders, prompt_tuning, slots
from jaxft.peft.encoders import LSTM, Layers
from jaxft.peft.slot_formats import ROWS
from jaxft.peft.slots import Host, Slotted


@dataclass(frozen=True)
class PTuning(Slotted):
    """A learnt prompt made by a small network. Default learning rate 3e-3."""

    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: three linear layers, or a bidirectional LSTM and two."""
    hidden: int | None = None
    """Width of the network; default: that of the model."""
    lstm_layers: int = 2
    """Layers of the LSTM."""
    dropout: float = 0.0
    """Probability of zeroing a feature between the layers of the LSTM while training."""

    slot: ClassVar[str] = slots.PROMPT

    def __post_init__(self) -> None:
        super().__post_init__()
        good = {
            "hidden": self.hidden is None or self.hidden >= 1,
            "lstm_layers": self.lstm_layers >= 1,
            "dropout": 0.0 <= self.dropout < 1.0 and (self.encoder == "lstm" or self.dropout == 0.0),
        }
        for field, fine in good.items():
            if not fine:
                expected = "hidden, lstm_layers >= 1; 0 <= dropout < 1, 0 with the mlp"
                raise ValueError(f"peft.{field}: got {getattr(self, field)}; expected {expected}")

    def make(self, model: Host, params: tree.Params, key: jax.Array) -> Slot:
        features = params["embed"]["tokens"].shape[-1]
        hidden = self.hidden or features
        inputs_key, mlp_key, lstm_key = jax.random.split(key, 3)
        inputs = jax.random.normal(inputs_key, (self.tokens, features))
        if self.encoder == "mlp":
            return EncodedPrompt(inputs, encoders.linears(mlp_key, (features, hidden, hidden, features)))
        layers = encoders.lstm_layers(lstm_key, features, hidden, self.lstm_layers)
        head = encoders.linears(mlp_key, (2 * hidden, 2 * hidden, features))
        return EncodedPrompt(inputs, head, layers, rate=self.dropout)


@weight
class EncodedPrompt(Slot):
    """``mlp(lstm(inputs))``, or without an ``lstm`` ``mlp(inputs)``. inputs: float32[n, D]."""

    inputs: jax.Array = trainable()
    mlp: Layers = trainable()
    lstm: LSTM | None = trainable(default=None)
    key: jax.Array | None = None
    rate: float = static(default=0.0)

    @property
    def shape(self):
        return (1, *self.inputs.shape)

    def dense(self):
        x = encoders.lstm(self.lstm, self.inputs, self._dropped) if self.lstm else self.inputs
        return encoders.mlp(self.mlp, x, jax.nn.relu)[None]

    def _dropped(self, i: int, x: jax.Array) -> jax.Array:
        if self.key is None or self.rate == 0.0:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(self.key[0], i), 1.0 - self.rate, x.shape)
        return jnp.where(keep, x / (1.0 - self.rate), 0.0)


def _described(w: EncodedPrompt) -> tuple[dict[str, Any], dict[str, Any]]:
    first = w.lstm["0"]["state"].shape[1] if w.lstm else w.mlp["0"]["bias"].shape[0]
    fields = {
        "token_dim": w.inputs.shape[-1],
        "encoder_reparameterization_type": "LSTM" if w.lstm else "MLP",
        "encoder_hidden_size": first,
        "encoder_num_layers": len(w.lstm) if w.lstm else 2,
        "encoder_dropout": w.rate,
    }
    return fields, {ROWS: w.dense()[0]}


FORMAT = dataclasses.replace(
    prompt_tuning.FORMAT,
    peft_type="P_TUNING",
    leaf=EncodedPrompt,
    own=("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    write=_described,
)
