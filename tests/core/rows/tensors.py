"""Rows of the methods whose update is made of tensors other than two factors."""

from jaxft.peft import LoRA, VeRA
from tests.core.rows.build import Row, adapted, affine, matrix

HERE = ("w",)

ROWS: dict[str, Row] = {
    "vera": Row(adapted(matrix, VeRA(rank=5, targets=HERE))),
    "vera on some layers in affine, dropout": Row(
        adapted(affine, VeRA(rank=5, targets=HERE, dropout=0.5, layers=(0, 2)))
    ),
    "vera on lora": Row(adapted(matrix, LoRA(rank=2, targets=HERE), VeRA(rank=5, targets=HERE))),
}
