"""Rows of the model's own weights, of weights trained whole, and of the LoRA family."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.weight import Untied
from jaxft.peft import DoRA, LoftQ, LoRA, LoRAFA, lora_data, sites, whole
from tests.core.rows.build import IN, LAYERS, LINEAR, OUT, Build, Row, adapted, affine, embedding, matrix


def untied(key: jax.Array, dtype: jnp.dtype) -> Untied:
    return Untied(matrix(key, dtype), matrix(jax.random.fold_in(key, 1), dtype))


def with_statistics(config: LoRA, statistics: Any) -> Build:
    """A matrix with a method that begins from data."""

    def build(key: jax.Array, dtype: jnp.dtype) -> Any:
        params = {"layers": {"w": matrix(key, dtype)}, "head": jnp.zeros((OUT, OUT), dtype)}
        return sites.adapt(params, LINEAR, key, config, {"layers/w": statistics})["layers"]["w"]

    return build


def eva() -> lora_data.Directions:
    """Directions of uneven ranks."""
    ranks = np.array([1, 0, 4], np.int32)
    vectors = jax.random.normal(jax.random.key(5), (LAYERS, IN, 4))
    return lora_data.Directions(jnp.where(np.arange(4) < ranks[:, None, None], vectors, 0.0), ranks)


def covariance() -> jax.Array:
    x = jax.random.normal(jax.random.key(6), (LAYERS, 40, IN))
    return jnp.swapaxes(x, 1, 2) @ x / 40


def of(config: type[LoRA], **settings: Any) -> LoRA:
    return config(**{"rank": 3, "targets": ("w",), **settings})


LAYER_RANKS = {"rank_pattern": {"2.w": 5}}
PATTERNS = {"rank_pattern": {"0.w": 1, "2.w": 5}, "alpha_pattern": {"1.w": 0.5}}
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
    "lora on some layers": Row(adapted(matrix, LoRA(rank=3, targets=("w",), layers=(0, 2))), left_out=(1,)),
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
    "lora random": Row(adapted(matrix, of(LoRA, init="random")), identity=False),
    "lora orthogonal": Row(adapted(matrix, of(LoRA, rank=4, init="orthogonal", rank_pattern={"1.w": 2}))),
    "lora pissa": Row(adapted(matrix, of(LoRA, init="pissa", **PATTERNS))),
    "lora pissa, some layers, dropout": Row(
        adapted(affine, of(LoRA, init="pissa", pissa_iterations=2, layers=(0, 2), dropout=0.5))
    ),
    "lora olora": Row(adapted(matrix, of(LoRA, init="olora"))),
    "lora loftq": Row(adapted(matrix, of(LoRA, init="loftq", layers=(0, 2))), identity=False),
    "lora loftq 2 bits": Row(
        adapted(affine, of(LoRA, init="loftq", loftq=LoftQ(bits=2, iterations=3))), identity=False
    ),
    "lora eva": Row(with_statistics(of(LoRA, init="eva"), eva())),
    "lora corda": Row(with_statistics(of(LoRA, init="corda"), covariance())),
    "lora bias": Row(adapted(matrix, of(LoRA, lora_bias=True, layers=(0, 2)))),
    "lora bias in affine": Row(adapted(affine, of(LoRA, lora_bias=True, dropout=0.2, **PATTERNS))),
    # lora_fa
    "lora_fa": Row(adapted(matrix, of(LoRAFA))),
    "lora_fa ranks by layer, dropout": Row(adapted(affine, of(LoRAFA, layers=(0, 2), dropout=0.2, **LAYER_RANKS))),
    "lora_fa pissa": Row(adapted(matrix, of(LoRAFA, init="pissa"))),
    # dora
    "dora": Row(adapted(matrix, of(DoRA))),
    "dora in affine, some layers": Row(adapted(affine, of(DoRA, layers=(0, 2), rslora=True))),
    "dora dropout": Row(adapted(matrix, of(DoRA, dropout=0.5))),
    "dora ranks by layer": Row(adapted(matrix, of(DoRA, **PATTERNS))),
    "dora pissa": Row(adapted(matrix, of(DoRA, init="pissa", layers=(0, 2)))),
    "dora random": Row(adapted(matrix, of(DoRA, init="random")), identity=False),
    "dora on lora": Row(adapted(matrix, W, of(DoRA, rank=2)), dense_gradient=True),
    "dora embedding": Row(embedding(DoRA(rank=3, targets=("embed",)), tied=False), embedding=True),
    "dora embedding, tied head": Row(embedding(DoRA(rank=3, targets=("embed",)), tied=True), embedding=True),
    "dora on a tied head": Row(embedding(DoRA(rank=3, targets=("lm_head",)), tied=True), embedding=True, experts=False),
}  # fmt: skip
