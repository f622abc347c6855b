"""What Hugging Face calls our weights: a family's name map, as data.

Each row pairs one of our paths with a torch module. Loading, export and adapters all read the same rows, so a family
states its names once. ``{}`` in a module name is the layer index of a weight stacked on axis 0.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "conv1d", "embedding", "norm"]


@dataclass(frozen=True)
class Name:
    """One module: our ``path``, the torch ``module``, and how the tensor is laid out on disk."""

    path: str
    """Path of the weight in our tree, such as ``layers/attn/q``; for a norm, of the dict that holds scale and bias."""
    module: str
    """Torch module name, such as ``model.layers.{}.self_attn.q_proj``."""
    kind: Kind
    """linear: [out, in] on disk, transposed to ours; conv1d: [in, out]; embedding: [rows, features]; norm: vectors."""
    bias: bool = False
    """Whether the module has a bias (ours: the bias of an Affine, or a norm's ``bias``)."""

    @property
    def stacked(self) -> bool:
        """Whether the weight is stacked over layers on axis 0."""
        return "{}" in self.module

    def modules(self, num_layers: int) -> tuple[str, ...]:
        """The torch module of each layer (a single one if not stacked)."""
        return tuple(self.module.format(i) for i in range(num_layers)) if self.stacked else (self.module,)


Names = tuple[Name, ...]
