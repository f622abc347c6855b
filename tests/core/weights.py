"""The table of every Weight there is: a new leaf enters the conformance tests by one row.

A row builds a *stack* of layers at initialisation, through the method's own ``adapt`` where it has one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.core import tree, verbs
from jaxft.core.names import Name
from jaxft.core.weight import Affine, Untied, Weight
from jaxft.peft import lora, whole
from jaxft.peft.lora import LoRA

LAYERS, IN, OUT = 3, 10, 14
LINEAR = (Name("layers/w", "layers.{}.w", "linear"), Name("head", "lm_head", "linear"))
EMBEDDING = (Name("embed/tokens", "embed", "embedding"), Name("layers/w", "layers.{}.w", "linear"))

Build = Callable[[jax.Array, jnp.dtype], Weight]


@dataclass(frozen=True)
class Row:
    """One kind of Weight, or one nesting, and what holds for it."""

    build: Build
    """A stack ``[LAYERS, IN, OUT]`` at initialisation, from a key and the dtype of the base."""
    identity: bool = True
    """Whether it equals the stripped weight at initialisation."""
    matrix: bool = True
    """Whether it is ``x @ dense + constant``."""
    dense_gradient: bool = False
    """Whether a matrix of the weight's own shape trains."""
    embedding: bool = False
    """Whether `take` and `unembed` are defined."""
    experts: bool = True
    """Whether `ragged_dot` is defined."""


def normal(key: jax.Array, dtype: jnp.dtype, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape).astype(dtype) / jnp.asarray(4, dtype)


def matrix(key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A plain stack of matrices."""
    return normal(key, dtype, LAYERS, IN, OUT)


def affine(key: jax.Array, dtype: jnp.dtype) -> Affine:
    return Affine(matrix(key, dtype), normal(jax.random.fold_in(key, 9), dtype, LAYERS, OUT))


def adapted(base: Callable, *configs: LoRA) -> Build:
    """The base with LoRA, more than once if more than one config is given."""

    def build(key: jax.Array, dtype: jnp.dtype) -> Weight:
        params = {"layers": {"w": base(key, dtype)}, "head": jnp.zeros((OUT, OUT), dtype)}
        for i, config in enumerate(configs):
            params = lora.adapt(params, LINEAR, jax.random.fold_in(key, i), config)
        return params["layers"]["w"]

    return build


def embedding(config: LoRA, tied: bool) -> Build:
    """A stack of adapted embeddings; ``tied``: the model has no head of its own."""

    def one(key: jax.Array, dtype: jnp.dtype) -> Weight:
        params = {"embed": {"tokens": normal(key, dtype, IN, OUT)}, "layers": {"w": jnp.zeros((2, 4, 4), dtype)}}
        params |= {} if tied else {"head": jnp.zeros((OUT, IN), dtype)}
        return lora.adapt(params, EMBEDDING, key, config)["embed"]["tokens"]

    def build(key: jax.Array, dtype: jnp.dtype) -> Weight:
        layers = [one(k, dtype) for k in jax.random.split(key, LAYERS)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    return build


def untied(key: jax.Array, dtype: jnp.dtype) -> Untied:
    return Untied(matrix(key, dtype), matrix(jax.random.fold_in(key, 1), dtype))


W = LoRA(rank=3, targets=("w",))
E = LoRA(rank=3, targets=("embed",))
SAVED = LoRA(rank=3, targets=("w",), modules_to_save=("embed",))

ROWS: dict[str, Row] = {
    # the model's own
    "affine": Row(affine),
    "untied": Row(untied, embedding=True, experts=False),
    # trained whole
    "whole": Row(lambda k, d: whole.in_place(matrix(k, d)), dense_gradient=True),
    "whole affine": Row(lambda k, d: whole.in_place(affine(k, d)), dense_gradient=True),
    "whole embedding": Row(embedding(SAVED, tied=False), dense_gradient=True, embedding=True),
    "whole embedding, tied head": Row(embedding(SAVED, tied=True), dense_gradient=True, embedding=True),
    "whole embedding, tied head follows": Row(
        embedding(LoRA(rank=3, targets=("w",), modules_to_save=("embed",), ensure_weight_tying=True), tied=True),
        dense_gradient=True,
        embedding=True,
    ),
    # lora
    "lora": Row(adapted(matrix, W)),
    "lora rslora": Row(adapted(matrix, LoRA(rank=4, alpha=6, targets=("w",), rslora=True))),
    "lora gaussian": Row(adapted(matrix, LoRA(rank=3, targets=("w",), init="gaussian"))),
    "lora a_zero": Row(adapted(matrix, LoRA(rank=3, targets=("w",), init="a_zero"))),
    "lora dropout": Row(adapted(matrix, LoRA(rank=3, targets=("w",), dropout=0.5))),
    "lora ranks by layer": Row(
        adapted(matrix, LoRA(rank=3, targets=("w",), rank_pattern={"0.w": 1, "2.w": 5}, alpha_pattern={"1.w": 0.5}))
    ),
    "lora on some layers": Row(adapted(matrix, LoRA(rank=3, targets=("w",), layers=(0, 2)))),
    "lora in affine": Row(adapted(affine, W)),
    "lora on lora": Row(adapted(matrix, W, LoRA(rank=2, targets=("w",)))),
    "lora on lora in affine, dropout": Row(
        adapted(affine, LoRA(rank=2, targets=("w",), dropout=0.2), LoRA(rank=3, targets=("w",), dropout=0.5))
    ),
    "lora embedding": Row(embedding(E, tied=False), embedding=True),
    "lora embedding, tied head": Row(embedding(E, tied=True), embedding=True),
    "lora on a tied head": Row(embedding(LoRA(rank=3, targets=("lm_head",)), tied=True), embedding=True, experts=False),
    "whole tied head": Row(
        embedding(LoRA(rank=3, targets=("w",), modules_to_save=("lm_head",)), tied=True),
        dense_gradient=True,
        embedding=True,
        experts=False,
    ),
    "lora embedding, tied head follows": Row(
        embedding(LoRA(rank=3, targets=("embed",), ensure_weight_tying=True), tied=True), embedding=True
    ),
}  # fmt: skip


def trained(w: Weight, key: jax.Array, steps: int = 2) -> Weight:
    """The weight after some steps of sign descent on a random target: off its initialisation, its invariants kept."""
    if not any(jax.tree.leaves(_mask(w))):
        return w
    trainable, frozen = tree.partition(w, _mask(w))
    x = jax.random.normal(key, (5, IN)).astype(w.dtype)
    features = jax.random.normal(jax.random.fold_in(key, 2), (5, OUT)).astype(w.dtype)
    target = jax.random.normal(jax.random.fold_in(key, 1), (LAYERS, 5, OUT))

    @jax.jit
    @jax.grad
    def gradient(trainable):
        whole = tree.combine(trainable, frozen)
        y = jax.vmap(lambda w: x @ w)(whole)
        loss = jnp.sum((y.astype(jnp.float32) - target) ** 2)
        if isinstance(w, Untied):  # only the look-up is a product: its head must move as well
            loss += jnp.sum(jnp.sin(jax.vmap(lambda w: verbs.unembed(w, features))(whole).astype(jnp.float32)))
        return loss

    for _ in range(steps):
        trainable = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), trainable, gradient(trainable))
    return tree.combine(trainable, frozen)


def _mask(w: Weight) -> Weight:
    try:
        return tree.trainable_mask(w)
    except ValueError:
        return jax.tree.map(lambda _: False, w)


def split(w: Weight) -> tuple[Weight, Weight]:
    """The weight's (trainable, frozen) parts; nothing trains in the model's own weights."""
    return tree.partition(w, _mask(w))
