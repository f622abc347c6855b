"""One description for every decoder: what a family file fills in from a Hugging Face config.

All fields are static (hashable); the config is part of the jit key. Sizes are words here and letters in the code:
hidden_size D, mlp_size F, num_heads N, num_kv_heads K, head_dim H, vocab_size V, num_layers L.
"""

from dataclasses import dataclass
from typing import Literal

from jaxft.models.rope import Rope


@dataclass(frozen=True)
class Layer:
    """The kind of one layer. Layers that differ are scanned by period, their kinds static inside one period."""

    window: int | None = None
    """Sliding attention window in tokens, itself included; None: all that precedes."""
    rope: int | None = 0
    """Index into ModelConfig.ropes; None: no position encoding in this layer."""
    score_scale: float = 1.0
    """Multiplier of this layer's attention scores, beside the model's own (some gpt2)."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a causal decoder, with a head over the vocabulary or one that scores sequences."""

    family: str
    """Name of the family file, Hugging Face's model_type."""
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    """One entry per layer."""
    ropes: tuple[Rope, ...] = ()
    """Rotary tables that the layers refer to."""
    max_positions: int = 2048
    """Longest sequence the checkpoint was made for."""
    learned_positions: bool = False
    """Absolute position embeddings added to the input (gpt2)."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """Added to the norm's scale: 1 for gemma, whose scales are stored as differences from one."""
    pre_norm: bool = True
    """A norm before attention and before the mlp."""
    post_norm: bool = False
    """A norm after attention and after the mlp, before the residual is added."""
    parallel_residual: bool = False
    """Attention and mlp both read the layer's input (gpt_neox)."""
    qk_norm: Literal["head", "whole"] | None = None
    """A norm of queries and keys: over each head, or over the whole projection."""
    qkv: Literal["separate", "blocks", "heads"] = "separate"
    """Fused projections: blocks is [q | k | v]; heads is [q k v] head by head (gpt_neox)."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    """down(act(gate(x)) * up(x)); otherwise down(act(up(x)))."""
    fused_gate_up: bool = False
    """One projection [gate | up] (phi3)."""
    attn_scale: float | None = None
    """Multiplier of the attention scores; default 1 / sqrt(head_dim)."""
    attn_softcap: float | None = None
    """Cap c on attention scores: c * tanh(score / c)."""
    final_softcap: float | None = None
    """Cap on the output logits, likewise."""
    embed_scale: float = 1.0
    """Multiplier of the token embeddings (gemma), part of the look-up: the rows of a prompt are not multiplied."""
    input_scale: float = 1.0
    """Multiplier of what enters the first layer, be it a token's embedding or a prompt's row (granite)."""
    residual_scale: float = 1.0
    """Multiplier of what a block adds to the residual stream (granite)."""
    logits_scale: float = 1.0
    """Multiplier of the logits (granite divides by logits_scaling)."""
    tie_embeddings: bool = False
    """Whether the head is the token embedding."""
    labels: int = 0
    """Outputs of the head that scores a sequence, in the place of the one over the vocabulary; 0: a language model."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def period(self) -> int:
        """Smallest number of layers that divides the depth and after which the kinds repeat."""
        n = self.num_layers
        return next(p for p in range(1, n + 1) if n % p == 0 and self.layers == self.layers[:p] * (n // p))
