"""Rows of the model's own weights, of weights trained whole, and of LoRA."""

import jax
import jax.numpy as jnp

from jaxft.core.weight import Untied
from jaxft.peft import whole
from jaxft.peft.lora import LoRA
from tests.core.rows.build import Row, adapted, affine, embedding, matrix


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
}  # fmt: skip
